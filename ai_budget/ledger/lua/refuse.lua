-- Count one refusal in every scope of its day.
--
-- KEYS  the days' hashes of refusals, one for each scope
-- ARGV  milliseconds to keep them, then the scopes

for i, key in ipairs(KEYS) do
  redis.call('HINCRBY', key, ARGV[i + 1], 1)
  redis.call('PEXPIRE', key, ARGV[1])
end

-- Read fields of hashes that count.
--
-- KEYS  the windows' hashes
-- ARGV  for each of them the JSON of its fields
--
-- Returns {'unready', which}, or 'ready' and the values of each, as text.

local run, found = run_id(), {'ready'}
for i, key in ipairs(KEYS) do
  if not is_ready(key, run) then return {'unready', i} end
  found[i + 1] = redis.call('HMGET', key, unpack(cjson.decode(ARGV[i])))
end
return found

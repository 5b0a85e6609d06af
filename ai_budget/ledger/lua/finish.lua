-- Let a filled hash count, after what was booked meanwhile.
--
-- KEYS  the hash
-- ARGV  the claimant's token, milliseconds to keep the hash
--
-- Returns 'ok', or 'lost' if the claim is gone or the server is another one, or if a step is
-- missing: then the hash is dropped.

local key, run = KEYS[1], run_id()
local claim = redis.call('HGET', key, 'loading')
if not claim then return 'lost' end
local holder, at_run = string.match(claim, '^(%S+) (%S+) ')
if holder ~= ARGV[1] or at_run ~= run then return 'lost' end

local steps, before = {}, nil
for step in string.gmatch(redis.call('HGET', key, 'pending') or '', '[^\n]+') do
  steps[#steps + 1] = cjson.decode(step)
end
-- Steps of one row may have come in another order than the journal has them in.
while #steps > 0 and #steps ~= before do
  local lost = {}
  for _, step in ipairs(steps) do
    if book(key, unpack(step)) == 'lost' then lost[#lost + 1] = step end
  end
  steps, before = lost, #steps
end
if #steps > 0 then
  redis.call('UNLINK', key)
  return 'lost'
end
redis.call('HDEL', key, 'loading', 'pending')
redis.call('HSET', key, 'run', run)
redis.call('PEXPIRE', key, ARGV[2])
return 'ok'

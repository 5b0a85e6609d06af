-- Say that the claimant of a hash is alive.
--
-- KEYS  the hash
-- ARGV  the claimant's token

local claim = redis.call('HGET', KEYS[1], 'loading')
if not claim then return end
local holder, run = string.match(claim, '^(%S+) (%S+) ')
if holder == ARGV[1] then
  redis.call('HSET', KEYS[1], 'loading', holder .. ' ' .. run .. ' ' .. whole(now_ms('')))
end

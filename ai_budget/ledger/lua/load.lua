-- Put fields into a hash that this claimant fills.
--
-- KEYS  the hash
-- ARGV  the claimant's token, then fields and values
--
-- Returns 'ok', or 'lost' if the claim is gone.

local claim = redis.call('HGET', KEYS[1], 'loading')
if not claim or string.match(claim, '^(%S+) ') ~= ARGV[1] then return 'lost' end
redis.call('HSET', KEYS[1], unpack(ARGV, 2))
return 'ok'

-- Take the refusals that were counted since the last time: scopes and counts in turn.
--
-- KEYS  the day's hash of refusals

local found = redis.call('HGETALL', KEYS[1])
redis.call('UNLINK', KEYS[1])
return found

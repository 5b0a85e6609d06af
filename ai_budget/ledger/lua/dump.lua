-- Read a hash that counts as it is at one moment.
--
-- KEYS  the hash
--
-- Returns the server's time, in seconds and microseconds, then fields and values; nothing for a
-- hash that does not count.

if not is_ready(KEYS[1], run_id()) then return {} end
local found = redis.call('HGETALL', KEYS[1])
local time = redis.call('TIME')
table.insert(found, 1, time[1])
table.insert(found, 2, time[2])
return found

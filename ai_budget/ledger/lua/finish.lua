-- Let a filled hash count, after the rows that were settled meanwhile.
--
-- KEYS  the hash
-- ARGV  the claimant's token, milliseconds to keep the hash
--
-- Returns 'ok', or 'lost' if the claim is gone or the server is another one.

local key, run = KEYS[1], run_id()
local claim = redis.call('HGET', key, 'loading')
if not claim then return 'lost' end
local holder, at_run = string.match(claim, '^(%S+) (%S+) ')
if holder ~= ARGV[1] or at_run ~= run then return 'lost' end

for settled in string.gmatch(redis.call('HGET', key, 'pending') or '', '[^\n]+') do
  close(key, unpack(cjson.decode(settled)))
end
redis.call('HDEL', key, 'loading', 'pending')
redis.call('HSET', key, 'run', run)
redis.call('PEXPIRE', key, ARGV[2])
return 'ok'

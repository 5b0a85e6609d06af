-- Claim the filling of a hash for one worker. While it is claimed nobody takes from it.
--
-- KEYS  the hash
-- ARGV  the claimant's token, how: 'missing' fills it if it does not count, 'anew' whatever it
--       holds, 'keep' only holds it still; milliseconds after which a claim is void
--
-- Returns 'ready', 'wait' if somebody else has claimed it, 'missing' if there is nothing to
-- keep, or 'go'.

local key, token, how = KEYS[1], ARGV[1], ARGV[2]
local run, now = run_id(), now_ms('')
local ready = is_ready(key, run)
if how == 'missing' and ready then return 'ready' end

local claim = redis.call('HGET', key, 'loading')
if claim then
  local holder, at_run, since = string.match(claim, '^(%S+) (%S+) (%d+)$')
  if holder ~= token and at_run == run and now - tonumber(since) < tonumber(ARGV[3]) then
    return 'wait'
  end
end
if how == 'keep' and not ready then return 'missing' end
if how == 'keep' then
  redis.call('HDEL', key, 'run')
else
  redis.call('UNLINK', key)
end
redis.call('HSET', key, 'loading', token .. ' ' .. run .. ' ' .. whole(now))
redis.call('PEXPIRE', key, 3600000)
return 'go'

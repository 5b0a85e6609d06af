-- Book what a row, or a part of it, cost and give back what is held no more. Idempotent.
--
-- KEYS  the windows' hashes, then the buckets
-- ARGV  the eight arguments of book after its key, how many hashes are windows, the time in
--       milliseconds ('' for the server's), JSON of the buckets [{back, least, amount}]
--
-- Returns in how many hashes it was done, then which of them lack a step before it.

local windows = tonumber(ARGV[9])
local run, answer = run_id(), {0}

for i = 1, windows do
  if is_ready(KEYS[i], run) then
    local said = book(KEYS[i], unpack(ARGV, 1, 8))
    if said == 'done' then answer[1] = answer[1] + 1 end
    if said == 'lost' then answer[#answer + 1] = i end
  elseif redis.call('HEXISTS', KEYS[i], 'loading') == 1 then
    -- Whoever fills it may have read the journal before this was booked there.
    local pending = redis.call('HGET', KEYS[i], 'pending') or ''
    local step = cjson.encode({unpack(ARGV, 1, 8)})
    redis.call('HSET', KEYS[i], 'pending', pending .. step .. '\n')
  end
end

local buckets = cjson.decode(ARGV[11])
if #buckets > 0 then
  local now = now_ms(ARGV[10])
  for i, bucket in ipairs(buckets) do
    local used, at = drain(KEYS[windows + i], bucket, now)
    -- Said again, because the answer was lost, it gives nothing back again.
    local back = answer[1] > 0 and bucket.back or 0
    fill(KEYS[windows + i], bucket, math.max(used - back, bucket.least, 0), at)
  end
end
return answer

-- Book what a row cost and give back the rest. Idempotent: a row that is not open is booked.
--
-- KEYS  the windows' hashes, then the buckets
-- ARGV  the journal's row, its cost, '1' if it stays a call, how many hashes are windows, the
--       time in milliseconds ('' for the server's), JSON of the buckets [{back, least, amount}]
--
-- Returns in how many hashes it was open.

local row, cost, keep, windows = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local run, closed = run_id(), 0

for i = 1, windows do
  if is_ready(KEYS[i], run) then
    closed = closed + close(KEYS[i], row, cost, keep)
  elseif redis.call('HEXISTS', KEYS[i], 'loading') == 1 then
    -- Whoever fills it may have read the journal before this row was closed there.
    local pending = redis.call('HGET', KEYS[i], 'pending') or ''
    redis.call('HSET', KEYS[i], 'pending', pending .. cjson.encode({row, cost, keep}) .. '\n')
  end
end

local buckets = cjson.decode(ARGV[6])
if #buckets > 0 then
  local now = now_ms(ARGV[5])
  for i, bucket in ipairs(buckets) do
    local used, at = drain(KEYS[windows + i], bucket, now)
    -- Said again, because the answer was lost, it gives nothing back again.
    local back = closed > 0 and bucket.back or 0
    fill(KEYS[windows + i], bucket, math.max(used - back, bucket.least, 0), at)
  end
end
return closed

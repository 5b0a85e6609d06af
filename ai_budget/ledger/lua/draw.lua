-- Take one request from every bucket, or from none.
--
-- KEYS  the buckets
-- ARGV  the time in milliseconds ('' for the server's), JSON [{wanted, amount, full, enforced}]
--
-- Returns 'admitted' or 'refused' and the breaches {bucket, used}.

local now, used, at, breaches, refused = now_ms(ARGV[1]), {}, {}, {}, false
local buckets = cjson.decode(ARGV[2])
for i, bucket in ipairs(buckets) do
  used[i], at[i] = drain(KEYS[i], bucket, now)
  if used[i] + bucket.wanted > bucket.full then
    breaches[#breaches + 1] = {i, whole(used[i])}
    refused = refused or bucket.enforced == 1
  end
end
if refused then return {'refused', unpack(breaches)} end
for i, bucket in ipairs(buckets) do
  local wanted = math.min(used[i] + bucket.wanted, math.max(used[i], bucket.full))
  fill(KEYS[i], bucket, wanted, at[i])
end
return {'admitted', unpack(breaches)}

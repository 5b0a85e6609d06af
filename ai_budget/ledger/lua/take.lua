-- Take an attempt's amounts from every window and bucket, or from none. Idempotent by row.
--
-- KEYS  the windows' hashes, then the buckets
-- ARGV  the journal's row ('' only looks), the time in milliseconds ('' for the server's),
--       JSON {amount, calls, windows: [{scopes, checks: [[field, room, limit, enforced]]}],
--             buckets: [{wanted, amount, full, enforced}]}
--
-- Returns {'unready', which} for a hash that has to be filled from the journal first, else
-- 'admitted' or 'refused' and the breaches: {'w', window, check, taken, spent, 1 if taken has
-- the attempt itself in it} with amounts as text, {'b', bucket, used}.

local row, run = ARGV[1], run_id()
local asked = cjson.decode(ARGV[3])
local windows = #asked.windows

local mine, again = {}, windows > 0
for i = 1, windows do
  if not is_ready(KEYS[i], run) then return {'unready', i} end
  -- The journal was read between this row's writing and its taking: it is in already. Or this
  -- is said again, because the answer was lost: then it has taken from the buckets, too.
  local kept = row ~= '' and redis.call('HGET', KEYS[i], '#' .. row)
  mine[i] = kept and cjson.decode(kept)
  again = again and mine[i] and mine[i][4] == 1
end

local breaches, refused = {}, false
for i, window in ipairs(asked.windows) do
  for j, check in ipairs(window.checks) do
    local field, most = check[1], mine[i] and check[3] or check[2]
    local taken = redis.call('HGET', KEYS[i], field) or '0'
    if exceeds(taken, most) then
      local scope = string.sub(field, 3)
      local spent = string.sub(field, 1, 1) == 't'
        and (redis.call('HGET', KEYS[i], 's ' .. scope) or '0') or taken
      breaches[#breaches + 1] = {'w', i, j, taken, spent, mine[i] and 1 or 0}
      refused = refused or check[4] == 1
    end
  end
end

local now, used, at = now_ms(ARGV[2]), {}, {}
for i, bucket in ipairs(asked.buckets) do
  used[i], at[i] = drain(KEYS[windows + i], bucket, now)
  if used[i] + bucket.wanted > bucket.full and not again then
    breaches[#breaches + 1] = {'b', i, whole(used[i])}
    refused = refused or bucket.enforced == 1
  end
end

if row == '' then return {refused and 'refused' or 'admitted', unpack(breaches)} end

if refused then
  for i = 1, windows do
    if mine[i] then
      local amount, calls = mine[i][1], mine[i][2]
      book(KEYS[i], row, amount, calls, '', '', '0', amount == '0' and '0' or '-' .. amount, calls)
    end
  end
  return {'refused', unpack(breaches)}
end

for i, window in ipairs(asked.windows) do
  if not mine[i] then
    for _, scope in ipairs(window.scopes) do
      redis.call('HINCRBY', KEYS[i], 't ' .. scope, asked.amount)
      if asked.calls ~= '0' then
        redis.call('HINCRBY', KEYS[i], 'c ' .. scope, asked.calls)
      end
    end
  end
  redis.call('HSET', KEYS[i], '#' .. row,
    cjson.encode({asked.amount, asked.calls, window.scopes, 1}))
end
for i, bucket in ipairs(asked.buckets) do
  if not again then
    -- In shadow mode it may be empty already, and goes no lower.
    local wanted = math.min(used[i] + bucket.wanted, math.max(used[i], bucket.full))
    fill(KEYS[windows + i], bucket, wanted, at[i])
  end
end
return {'admitted', unpack(breaches)}

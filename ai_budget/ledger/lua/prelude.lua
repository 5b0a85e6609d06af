-- What every script begins with.
--
-- One hash holds one calendar day or month, so that what is lost of it is lost whole:
--   run          the server's run id when it was filled; without it nothing in it counts
--   loading      who is filling it: token, run id, since when in milliseconds
--   s SCOPE      spent, t SCOPE  spent and held, both in nano-dollars;  c SCOPE  calls
--   #ROW         an open row of the journal: JSON of its nano-dollars, calls and scopes, and
--                1 once it was admitted by this very server
--   pending      what was booked while the hash was being filled: JSON of book's arguments,
--                one a line
--
-- Amounts stay text: Lua's numbers are exact to 2^53 only, HINCRBY to 2^63.

local function run_id()
  return string.match(redis.call('INFO', 'server'), 'run_id:(%w+)')
end

local function is_ready(key, run)
  return redis.call('HGET', key, 'run') == run
end

-- Say whether one whole number is greater than another, at any length.
local function exceeds(one, other)
  local negative, other_negative = one:sub(1, 1) == '-', other:sub(1, 1) == '-'
  if negative ~= other_negative then return other_negative end
  if negative then one, other = other:sub(2), one:sub(2) end
  if #one ~= #other then return #one > #other end
  return one > other
end

local function whole(number)
  return string.format('%.0f', number)
end

local function now_ms(given)
  if given ~= '' then return tonumber(given) end
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Return what is used of a bucket now, in units times its milliseconds, and when that is so.
local function drain(key, bucket, now)
  local kept = redis.call('HMGET', key, 'used', 'at')
  if not kept[1] then return 0, now end
  local at = tonumber(kept[2])
  local since = math.max(0, now - at)
  return math.max(0, tonumber(kept[1]) - since * bucket.amount), math.max(at, now)
end

-- Write what is used of a bucket; once it is full again it need not be kept.
local function fill(key, bucket, used, at)
  redis.call('HSET', key, 'used', whole(used), 'at', whole(at))
  if bucket.amount > 0 then
    redis.call('PEXPIRE', key, whole(math.ceil(used / bucket.amount) + 60000))
  end
end

-- Book what an open row, or a part of it, cost, and give back what is held no more.
--
-- amount, calls        what the row holds before, by the journal
-- left, left_calls     what it holds then; '' closes it
-- cost, change, back   what is spent more, what is taken more, how many calls are given back
--
-- Idempotent, for a row has fewer calls after every step: returns 'done', 'known' if it was
-- booked before, or 'lost' if a step before it was not.
local function book(key, row, amount, calls, left, left_calls, cost, change, back)
  local kept = redis.call('HGET', key, '#' .. row)
  if not kept then return 'known' end
  local entry = cjson.decode(kept)
  if entry[1] ~= amount or entry[2] ~= calls then
    if left ~= '' and tonumber(entry[2]) <= tonumber(left_calls) then return 'known' end
    return 'lost'
  end
  for _, scope in ipairs(entry[3]) do
    if cost ~= '0' then redis.call('HINCRBY', key, 's ' .. scope, cost) end
    if change ~= '0' then redis.call('HINCRBY', key, 't ' .. scope, change) end
    if back ~= '0' then redis.call('HINCRBY', key, 'c ' .. scope, '-' .. back) end
  end
  if left == '' then
    redis.call('HDEL', key, '#' .. row)
  else
    entry[1], entry[2] = left, left_calls
    redis.call('HSET', key, '#' .. row, cjson.encode(entry))
  end
  return 'done'
end

-- The bank's part of job_submit.lua: asks carrelctld about each submission, and each change of one, whether its account
-- covers it: one question over a unix socket, one sentence to the user. slurmctld holds its locks meanwhile, so it waits
-- no longer than deadline_ms; on silence bank.offline of carrel.toml decides (docs/reference/submit.md).

local M, VIOLATES_POLICY, unix, clock = {}, 2050 -- ESLURM_ACCOUNTING_POLICY; submit and modify return what slurmctld's do
local MISSES, PAUSE_S = 3, 1 -- after so many silences in a row nobody is asked for so long
local ASKED = { "account", "array_inx", "cores_per_socket", "cpus_per_task", "cpus_per_tres", "licenses", "max_nodes",
  "mem_per_tres", "min_mem_per_cpu", "min_mem_per_node", "min_nodes", "ntasks_per_core", "ntasks_per_gpu",
  "ntasks_per_node", "ntasks_per_socket", "ntasks_per_tres", "num_tasks", "partition", "pn_min_cpus", "qos",
  "req_nodes", "shared", "sockets_per_node", "threads_per_core", "time_limit", "tres_per_job", "tres_per_node",
  "tres_per_socket", "tres_per_task" }
local SILENT = "carrelctld does not answer, so nobody can say whether the account covers this; try again later"
local UNSET = { [65534] = true, [4294967294] = true }
local settings = { enabled = "false", socket = "/run/carrel/submit.sock", dir = "/var/lib/carrel/bank",
  deadline_ms = "50", offline = "closed", default_account = "" }
local silences, ask_again_s = 0, 0

local function lines(path)
  local file = io.open(path)
  return file and file:lines() or function() end
end

local function refused(text)
  slurm.log_user("%s", text)
  return VIOLATES_POLICY
end

local section = ""
for line in lines(os.getenv("CARREL_CONFIG") or "/etc/carrel/carrel.toml") do
  section = line:match("^%s*%[%s*([^%]]-)%s*%]") or section
  local key, text = line:match("^%s*([%w_]+)%s*=%s*(.*)")
  local value = text and (text:match('^"([^"]*)"') or text:match("^'([^']*)'") or text:match("^[^#%s]*"))
  if section == "bank" and key and settings[key] then settings[key] = value end
end
if settings.enabled == "true" then unix, clock = require "socket.unix", require("socket").gettime end -- lua-socket's

-- Returns the words of the answer, or nil: nobody answered in time.
local function ask(question)
  local until_s = clock() + tonumber(settings.deadline_ms) / 1000
  if silences >= MISSES and clock() < ask_again_s then return nil end
  local socket = (type(unix) == "table" and unix.stream or unix)() -- luasocket before 3.1 has a function there
  local function bounded() socket:settimeout(math.max(0, until_s - clock())) end
  bounded()
  local answer = socket:connect(settings.socket)
  bounded()
  answer = answer and socket:send(question .. "\n")
  bounded()
  answer = answer and socket:receive("*l")
  socket:close()
  local word, rest = tostring(answer or ""):match("^(%l+)\t(.*)$")
  if not word or word == "away" then
    silences, ask_again_s = silences + 1, clock() + PAUSE_S
    return nil
  end
  silences = 0
  return word, rest
end

local function random_token()
  local source = assert(io.open("/dev/urandom", "rb"))
  local bytes = source:read(16)
  source:close()
  return (bytes:gsub(".", function(byte) return ("%02x"):format(byte:byte()) end))
end

local function question(verb, words, job_desc)
  for _, name in ipairs(ASKED) do
    local value = job_desc[name]
    if type(value) == "number" and not UNSET[value] then words[#words + 1] = ("%s=%.0f"):format(name, value) end
    if type(value) == "string" then words[#words + 1] = name .. "=" .. value:gsub("%c", " ") end
  end
  for at = 0, (tonumber(job_desc.spank_job_env_size) or 0) - 1 do
    local name, value = (job_desc.spank_job_env[at] or ""):match("^CARREL_JOB_(%u+)=(.*)$")
    if name == "IMAGE" and value ~= "" then words[#words + 1] = "guest=1" end
    if name == "PER" then words[#words + 1] = "guest_per=" .. value:gsub("%c", " ") end
  end
  return verb .. "\31" .. table.concat(words, "\31")
end

-- The lease: what may be promised in silence, as carrelctld left it. Returns its number and figures.
local function read_lease()
  local lease = { partition = {}, account = {}, spent = {} }
  for _, name in ipairs({ "lease", "journal" }) do
    for line in lines(settings.dir .. "/" .. name) do
      local kind, key, amount, more = line:match("^(%l+) (%S+) (%d+) ?(%d*)")
      if kind == "number" then lease.number, lease.seconds = key, tonumber(amount) end
      if kind == "partition" or kind == "account" then lease[kind][key] = { tonumber(amount), tonumber(more) or 0 } end
      local number, account, spent = line:match("^took (%S+) (%S+) (%d+)")
      if number and number == lease.number then lease.spent[account] = (lease.spent[account] or 0) + tonumber(spent) end
    end
  end
  return lease
end

-- Takes a plain job on the lease, by whole nodes of the dearest kind; false: the lease does not reach, or cannot tell.
local function on_lease(job_desc, asked)
  local lease = read_lease()
  local account = job_desc.account or job_desc.default_account or settings.default_account
  local price = lease.partition[job_desc.partition or "*"]
  local function number(name) return job_desc[name] and not UNSET[job_desc[name]] and job_desc[name] end
  if not (lease.number and price and lease.account[account]) or job_desc.array_inx or job_desc.licenses
    or job_desc.req_nodes or job_desc.tres_per_job or job_desc.tres_per_socket or asked:find("\31guest=1", 1, true)
    or job_desc.time_limit == 0 or job_desc.time_limit == 4294967295 then return false end
  local seconds = number("time_limit") and job_desc.time_limit * 60 or price[2]
  local nodes = number("max_nodes") or math.max(number("min_nodes") or 1, number("num_tasks") or 1)
  local amount = math.ceil(nodes * price[1] * (seconds + lease.seconds) / 3600)
  if seconds <= 0 or amount + (lease.spent[account] or 0) > lease.account[account][1] then return false end
  local journal = io.open(settings.dir .. "/journal", "a")
  if not journal then return false end
  journal:write(("took %s %s %.0f %s\n"):format(lease.number, account, amount, asked))
  journal:close()
  return true
end

function M.submit(job_desc, submit_uid)
  if settings.enabled ~= "true" then return slurm.SUCCESS end
  local token = random_token()
  local words = { "token=" .. token, ("uid=%.0f"):format(job_desc.user_id or submit_uid) }
  if not job_desc.account and job_desc.default_account then words[3] = "account=" .. job_desc.default_account end
  local asked = question("submit", words, job_desc)
  local word, rest = ask(asked)
  if word == "refuse" then return refused(rest) end
  local hold = word == "hold"
  if not word and not (settings.offline == "open" and on_lease(job_desc, asked)) then
    if settings.offline == "closed" then return refused(SILENT) end
    hold = true
    slurm.log_user("%s", "carrelctld does not answer; the job is held and starts when its account was asked")
  end
  -- Slurm's accounting keeps no guests, so the token does: for each node, or for each task, which carrelctld then counts.
  local guests = asked:find("\31guest=1", 1, true) and (asked:find("\31guest_per=task", 1, true) and ".t" or ".g") or ""
  local others = job_desc.admin_comment and ";" .. job_desc.admin_comment or ""
  job_desc.admin_comment = "bank=" .. (rest or token .. guests) .. (hold and ";held" or "") .. others
  if hold then job_desc.priority = 0 end
  return slurm.SUCCESS
end

-- Only a change that has a price is asked about; root's are met at the next look at the queue.
function M.modify(job_desc, job_rec, modify_uid)
  local token, held = (job_rec.admin_comment or ""):match("^bank=([^;]*);?([^;]*)")
  if settings.enabled ~= "true" or not token or modify_uid == 0 then return slurm.SUCCESS end
  local words = { "token=" .. token, ("uid=%.0f"):format(modify_uid), ("job=%.0f"):format(job_rec.job_id) }
  local before, asked = #words, question("modify", words, job_desc)
  local release = held == "held" and job_desc.priority and not UNSET[job_desc.priority] and job_desc.priority > 0
  if #words == before and not release then return slurm.SUCCESS end
  local word, rest = ask(asked .. (release and "\31release=1" or ""))
  if word == "ok" or (not word and settings.offline == "open" and not release) then return slurm.SUCCESS end
  return refused(rest or SILENT)
end

return M

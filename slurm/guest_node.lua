-- Guests as nodes: what job_submit.lua does for jobs that have a guest which is a Slurm node of its own.
--
-- Such a job waits, held, in the partition of the guests; carrelctld finds it there, whatever else is lost, and what
-- it asked for stands in its admin_comment, which only administrators write: "carrel:" and name=value pairs as in a
-- URL. No question is asked here: which partition it is, and whether any host carries guests, stands in [guest_nodes] of
-- carrel.toml. docs/how-to/guests-as-nodes.md says how a site's own script calls this one.

local M = {}

local CONFIG = os.getenv("CARREL_CONFIG") or "/etc/carrel/carrel.toml"

local NOTHING = { [65534] = true, [254] = true, [4294967294] = true, [18446744073709551614] = true }
-- What carrelctld admits a job by; an owner who could change it would have more than was admitted.
local ADMITTED = { "priority", "partition", "reservation", "req_nodes", "exc_nodes", "features", "min_nodes", "max_nodes", "num_tasks",
	"min_cpus", "max_cpus", "cpus_per_task", "pn_min_cpus", "pn_min_memory", "min_mem_per_node", "min_mem_per_cpu",
	"ntasks_per_node", "shared", "gres", "tres_per_node", "tres_per_job", "admin_comment" }

local function given(value)
	return value ~= nil and value ~= "" and not NOTHING[value]
end

local function quoted(text)
	return (text:gsub("[^%w%-._~/:]", function(c) return string.format("%%%02X", c:byte()) end))
end

local function wishes(job)
	local found = {}
	for i = 0, (job.spank_job_env_size or 0) - 1 do
		local name, value = job.spank_job_env[i]:match("^CARREL_JOB_([A-Z_]+)=(.*)$")
		if name then
			found[name:lower()] = value
		end
	end
	return found
end

local EMPTY = { ['""'] = true, ["''"] = true, ["{}"] = true }
local partition, hosts = "guests", true -- the name, and whether any host is set; true, too, where nobody can tell
local knock = "/run/carrel/knock" -- guest_nodes.knock

-- Reads lines `key = value` below [guest_nodes]. What else may say the same in TOML counts as a host: only a certain no
-- refuses a job. A file that cannot be read may be there where carrelctld runs.
local function read_settings()
	local file = io.open(CONFIG)
	if not file then
		return
	end
	local section, found = "", { partition = "guests", knock = "/run/carrel/knock" }
	for line in file:lines() do
		if line:find("[", 1, true) then
			section = line:match("^%s*%[%s*([^%]]-)%s*%]") or section
		end
		if section:find("guest_nodes", 1, true) or line:find("guest_nodes", 1, true) then -- most lines are none of ours
			local key, text = line:match("^%s*([^#=%s]+)%s*=%s*(.-)%s*$")
			local name = (section .. "." .. (key or "")):gsub("^%.", ""):gsub("[\"'%s]", "")
			local ours = name:match("^guest_nodes%.?(.*)$")
			if key and (ours == "partition" or ours == "knock") then
				found[ours] = text:match('^"([^"]*)"') or text:match("^'([^']*)'") or found[ours]
			elseif key and (ours == "" or ours == "hosts" or (ours or ""):find("^remote")) then
				found.hosts = found.hosts or not EMPTY[text:gsub("%s*#[^\"'}]*$", ""):gsub("%s", "")]
			end
		end
	end
	file:close()
	partition, hosts, knock = found.partition, found.hosts, found.knock
end
read_settings()

local function refusal(job, wish, partitions)
	if partitions and not partitions[partition] then
		return "--guest-per=node: this cluster has no partition '" .. partition .. "' that you may use, and its nodes are the guests; "
			.. "take --guest-per=job, or ask an administrator (docs/how-to/guests-as-nodes.md says what is to be set up)"
	elseif not hosts then
		return "--guest-per=node: no host of this cluster carries such guests; take --guest-per=job, or ask an administrator "
			.. "(neither guest_nodes.hosts nor guest_nodes.remote is set in " .. CONFIG .. ")"
	elseif not wish.image then
		return "partition " .. partition .. " runs jobs in guests of their own: say --guest=IMAGE"
	elseif wish.per and wish.per ~= "node" then
		return "--guest-per=" .. wish.per .. ": partition " .. partition .. " has no other nodes than guests; leave it out"
	elseif given(job.partition) and job.partition ~= partition then
		return "--guest-per=node: such jobs run in partition " .. partition .. "; leave --partition out"
	elseif given(job.req_nodes) or given(job.exc_nodes) then
		return "--guest-per=node: the node is made for the job, on a host that is none of Slurm's; leave --nodelist and --exclude out"
	elseif given(job.het_job_offset) then
		return "--guest-per=node: not for the components of a heterogeneous job; submit them as jobs, or take --guest-per=job"
	elseif given(job.reservation) then
		return "--guest-per=node: the node is made for the job and is in nobody else's reservation; leave --reservation out"
	elseif job.pn_min_memory == 0 or job.min_mem_per_node == 0 then
		return "--guest-per=node: --mem=0 is all of a node, and the node is made for the job; say how much"
	end
end

-- Returns true where the job goes on, and false where it is refused, after the user was told why. `partitions` are those
-- that the user may use, as slurmctld hands them to slurm_job_submit.
function M.submit(job, partitions)
	local wish = wishes(job)
	if wish.per == "node" or job.partition == partition then
		read_settings() -- now, not when this script was loaded: whoever sets a host has it used by the next job
	end
	if wish.per ~= "node" and not (hosts and job.partition == partition) then
		return true
	end
	local why = refusal(job, wish, partitions)
	if why then
		slurm.log_user("carrel: %s", why)
		return false
	end
	local words = { "held=" .. (job.priority == 0 and "user" or "carrel") }
	if not given(job.comment) then -- until carrelctld has more to say, and where it never comes
		job.comment = job.priority == 0 and "carrel: waits for its owner to release it"
			or "carrel: waits for its guest, which carrelctld makes"
	end
	wish.per, wish.cwd = "node", job.work_dir
	for name, value in pairs(wish) do
		table.insert(words, name .. "=" .. quoted(value))
	end
	job.partition = partition
	job.priority = 0
	job.shared = 65534 -- The declared size of the node is no size to be given as a whole.
	job.admin_comment = "carrel:" .. table.concat(words, "&")
	local heard = io.open(knock) -- where carrelctld listens, it looks at once; else at its next look
	if heard then
		heard:close()
	end
	return true
end

-- slurmctld runs as SlurmUser, and this in it.
local function slurm_user()
	local file = io.open("/proc/self/status")
	local text = file and file:read("*a") or ""
	if file then
		file:close()
	end
	return tonumber(text:match("\nUid:%s+%d+%s+(%d+)"))
end

-- Returns true where the change is allowed. Root and SlurmUser change what they like: carrelctld is one of them.
function M.modify(change, job, uid)
	if uid == 0 or job.partition ~= partition or uid == slurm_user() then
		return true
	end
	local held_by_user = (job.admin_comment or ""):find("held=user", 1, true)
	if change.reservation == "" and job.reservation then
		change.reservation = job.reservation -- to be in none is a wish too
	end
	for _, name in ipairs(ADMITTED) do
		if given(change[name]) and not (name == "priority" and held_by_user) then
			slurm.log_user("carrel: job %u has been admitted as it is, or waits for that; scancel it and submit it anew", job.job_id)
			return false
		end
	end
	return true
end

return M

-- Slurm's job_submit/lua, beside slurm.conf. A site with a script of its own calls the same functions from there.

local parts = os.getenv("CARREL_LIBEXEC") or "/usr/libexec/carrel"
local guest_node = dofile(parts .. "/guest_node.lua")
local bank = dofile(parts .. "/bank.lua")

-- slurmctld takes a script that fails for a yes.
local function surely(decide)
	local done, answer = pcall(decide)
	if done then
		return answer
	end
	slurm.log_error("carrel: %s", tostring(answer))
	slurm.log_user("%s", "carrel: nobody can say whether this job may run; an administrator reads why in slurmctld's log")
	return slurm.ERROR
end

function slurm_job_submit(job, partitions, uid)
	return surely(function()
		return guest_node.submit(job, partitions) and bank.submit(job, uid) or slurm.ERROR
	end)
end

function slurm_job_modify(change, job, _, uid)
	return surely(function()
		return guest_node.modify(change, job, uid) and bank.modify(change, job, uid) or slurm.ERROR
	end)
end

return slurm.SUCCESS

-- Slurm's job_submit/lua, beside slurm.conf. A site with a script of its own calls the same functions from there.

local PARTITION = "guests" -- guest_nodes.partition
local parts = os.getenv("CARREL_LIBEXEC") or "/usr/libexec/carrel"
local guest_node = dofile(parts .. "/guest_node.lua")
local bank = dofile(parts .. "/bank.lua")

function slurm_job_submit(job, _, uid)
	return guest_node.submit(job, PARTITION) and bank.submit(job, uid) or slurm.ERROR
end

function slurm_job_modify(change, job, _, uid)
	return guest_node.modify(change, job, uid, PARTITION) and bank.modify(change, job, uid) or slurm.ERROR
end

return slurm.SUCCESS

-- Slurm's job_submit/lua, beside slurm.conf. A site with a script of its own calls the two functions from there.

local PARTITION = "guests"
local guest_node = dofile("/usr/libexec/carrel/guest_node.lua")

function slurm_job_submit(job, _, _)
	return guest_node.submit(job, PARTITION) and slurm.SUCCESS or slurm.ERROR
end

function slurm_job_modify(change, job, _, uid)
	return guest_node.modify(change, job, uid, PARTITION) and slurm.SUCCESS or slurm.ERROR
end

return slurm.SUCCESS

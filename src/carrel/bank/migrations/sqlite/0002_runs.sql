-- The loop over Slurm's queue asks for what is open, every few seconds, and for the runs of a job.
CREATE INDEX lien_open ON lien (cluster, id) WHERE state IN ('unbound', 'bound', 'active', 'unknown_end');
CREATE INDEX lien_job ON lien (job_id) WHERE job_id > 0;

-- A task of an array is found by its own job id, which only its run has in it: 'c/42.' of 'c/42.1731000000.0+1'. By the
-- job id of the array each new task would mean a look at all others. The expression stands in carrel.bank.runs too.
CREATE INDEX lien_task ON lien (rtrim(rtrim(rtrim(run_ref, '0123456789+'), '.'), '0123456789'))
    WHERE run_ref IS NOT NULL;

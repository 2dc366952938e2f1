"""The steps of a run, as functions over records: load, data, graph, calibrate, sensitivity, cost, allocate, solve,
verify, judge. `lowprec.api` wires them."""

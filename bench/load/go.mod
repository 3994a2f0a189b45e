module stratum/bench/load

go 1.21

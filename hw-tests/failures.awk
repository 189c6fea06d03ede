# Prints what tests that failed said, of a log of `go test -v` that is given
# twice: first their names are read, then what was printed under these names.
function name(s) { sub(/ \([0-9.]+s\)$/, "", s); return s }
FNR == 1 { file++; show = 0 }
file == 1 {
	if (match($0, /--- FAIL: /)) failed[name(substr($0, RSTART + RLENGTH))] = 1
	next
}
/^=== (RUN|NAME|CONT|PAUSE) / { show = ($3 in failed); next }
/--- FAIL: |^FAIL|^panic: |DATA RACE|\[build failed\]|^# / { print FNR ": " $0; if (/^panic: |DATA RACE|^# /) more = 60; next }
more > 0 { more--; print FNR ": " $0; next }
/^ *--- |^(ok|PASS|\?)/ { next }
show && !/ level=(DEBUG|INFO)/ { print FNR ": " $0 }

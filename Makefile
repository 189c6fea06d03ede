# Belay. `make demo` and `make test` are all a fresh machine needs to know.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := build

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
GOARCH  ?= $(shell go env GOARCH)
BIN     ?= bin
MODULES := . plugins/sdk
PLUGINS := containerd docker edgetpu process

# Lint uses the build's flags, so that nothing is compiled twice for it.
comma   = ,
FLAGS   = -buildvcs=false -trimpath -tags=grpcnotrace
GOBUILD = CGO_ENABLED=0 go build $(FLAGS) -ldflags '-s -w -X main.version=$(VERSION)'
RACE    = $(if $(filter 1,$(shell go env CGO_ENABLED)),-race)

# Headers of go-nvml declare deprecated what its bindings must still bind.
export CGO_CFLAGS ?= -O2 -g -Wno-deprecated-declarations

.PHONY: build demo test test-modules test-hangups test-systemd test-offline test-faults faults faults-teeth test-teeth test-docker test-vm test-arm lint bench bench-scale bench-idle fuzz generate check-generated setup clean

build: ## the binaries and the plugins, ready to load, in $(BIN)
	@mkdir -p $(BIN)/plugins
	@echo "building $(BIN)/ ($(VERSION), $(GOARCH))"
	@$(GOBUILD) -o $(BIN)/ ./agent/cmd/belay-agent ./controlplane/cmd/belay-control ./controlplane/cmd/belay \
		./plugins/cmd/belay-plugins ./plugins/process/cmd/belay-supervise
	@for p in $(PLUGINS); do ln -sfn ../belay-plugins $(BIN)/plugins/$$p; done
	@if [ "$$(GOARCH=$(GOARCH) go env CGO_ENABLED)" = 1 ] && command -v "$$(GOARCH=$(GOARCH) go env CC)" >/dev/null; then \
		CGO_ENABLED=1 GOARCH=$(GOARCH) go build $(FLAGS),netgo,osusergo -ldflags '-s -w -X main.version=$(VERSION)' -o $(BIN)/ ./plugins/cmd/belay-plugin-nvidia && \
		ln -sfn ../belay-plugin-nvidia $(BIN)/plugins/nvidia; \
	else echo "no C compiler for $(GOARCH), so no plugin nvidia: install gcc and libc6-dev, or name a cross compiler with CGO_ENABLED=1 CC=..."; fi

setup: ## what tests and demo need from the distribution
	@packaging/dev/setup.sh || { [ "$$(id -u)" -ne 0 ] && echo "going on without root: what needs the above is left out, and says so"; }

demo: setup build ## a control plane, a device and a container on this machine, until Ctrl-C
	@$(GOBUILD) -o $(BIN)/demo ./packaging/dev/demo
	@exec $(BIN)/demo -bin $(BIN)

test: setup build lint test-modules test-teeth ## everything, race detector on

# The black-box suite has the machine to itself: it holds promises in seconds.
# Results and the reason of every skipped test are shown, the rest is in the log.
TESTLOG  = $(abspath $(BIN))/test.log
GOTEST   = go test -v $(RACE) -timeout 15m
SHOW     = 2>&1 | tee -a $(TESTLOG) | awk '/\.go:[0-9]+: / && !/ level=/{why=$$0} /--- SKIP/{print; print why} /^(ok|FAIL|panic:)|--- FAIL|WARNING: DATA RACE/{print; fflush()}' \
	|| { echo "failed; of $(TESTLOG):"; awk -f $(CURDIR)/hw-tests/failures.awk $(TESTLOG) $(TESTLOG) | tail -n 300; exit 1; }
test-modules:
	@[ -n "$(RACE)" ] || echo "no C compiler, so no race detector: install gcc and libc6-dev for it"
	@rm -f $(TESTLOG)
	@for m in $(MODULES); do echo "== go test $$m"; (cd $$m && $(GOTEST) $$(go list ./... | grep -v /hw-tests) $(SHOW)) || exit 1; done
	@echo "== go test hw-tests"; export BELAY_BIN=$(abspath $(BIN)); $(GOTEST) -p 1 ./hw-tests/... $(SHOW)

lint: .tools/staticcheck ## gofmt, vet, staticcheck, go.mod in order
	@test -z "$$(gofmt -l . | tee >(cat >&2))" || { echo "not gofmt-ed: run gofmt -w on the files above"; exit 1; }
	@for m in $(MODULES); do echo "== lint $$m"; (cd $$m && export CGO_ENABLED=0 GOFLAGS="$(FLAGS)" && go mod tidy -diff >/dev/null && go vet ./... && $(CURDIR)/.tools/staticcheck ./...) || exit 1; done

# What kills meet is a matter of luck: the more, the better.
HANGUPS = 400
test-hangups: build ## containerd's starts, given up and killed in the middle, HANGUPS times each (minutes)
	BELAY_TEST_HANGUPS=$(HANGUPS) go test -count=1 -timeout 3h -v ./hw-tests/containerd -run '^TestConformance$$/none/(starter_goes_away|plugin_killed_in_the_middle)'

test-teeth: ## for each rule for runtimes, one that breaks it and no other (minutes)
	BELAY_TEST_TEETH=1 go test -v -count=1 -timeout 15m -run '^TestRuntimeSuiteHasTeeth$$' ./plugins/process

test-systemd: ## the process plugin and plugins' limits with a real systemd: the host's, or one booted in a container
	BELAY_TEST_NSPAWN=1 go test -count=1 -timeout 15m -run '^TestConformanceSystemd$$' -v ./plugins/process
	BELAY_TEST_NSPAWN=1 go test -count=1 -timeout 15m -run '^TestUnderSystemd$$' -v ./agent/internal/host

# Waits as long as the promises do: a daemon that hangs for half a minute, a
# restart policy that counts runs of a minute.
DOCKERTABLE = TestFirstTask|TestTaskRunWait|TestDependencies|TestRestartPolicy|TestKillWhileRunning|TestKillWhileItExits|TestKillAtRandomInstants|TestDevices
test-docker: build ## the black-box suite on a real Docker daemon, and all that a daemon can do to an agent (minutes)
	BELAY_TEST_DOCKER=1 go test -count=1 -timeout 20m -v ./hw-tests/blackbox -bin $(abspath $(BIN)) -run '^($(DOCKERTABLE))$$/^docker$$'
	BELAY_TEST_DOCKER=1 go test -count=1 -timeout 15m -v ./hw-tests/blackbox -bin $(abspath $(BIN)) -run '^(TestDocker.*|TestUpgradePlugins|TestDevicesByCDI)$$'
	BELAY_TEST_DOCKER=1 go test -count=1 -timeout 15m -v ./hw-tests/docker -run '^TestConformance$$'

test-offline: build ## a board cold-booted without a network, with a crash in its long absence (minutes)
	BELAY_TEST_OFFLINE=1 go test -count=1 -timeout 15m -run '^TestColdBootWithoutNetwork$$' -v ./hw-tests/blackbox -bin $(abspath $(BIN))

test-faults: build ## faults of plugins that take minutes to see
	BELAY_BIN=$(abspath $(BIN)) BELAY_TEST_FAULTS=1 go test -count=1 -timeout 15m -run '^TestTenThousandChangesAMinute$$' -v ./hw-tests/blackbox

FAULT_RUNS ?= 20
SEED       ?= 1
FIRST      ?= 0
FAULTTEST   = nice go test -count=1 -timeout 0 -v ./hw-tests/faults -seed $(SEED) -first $(FIRST)
faults: build ## a site under seeded faults: FAULT_RUNS=500 SEED=1, from run FIRST=0 (half a minute a run; needs root)
	$(FAULTTEST) -run '^TestFaults$$' -runs $(FAULT_RUNS) -bin $(abspath $(BIN))

BUGBIN = $(abspath $(BIN))/bugs
faults-teeth: ## bugs planted one at a time, each to be found by the same faults (BUG=NAME: only that)
	@mkdir -p $(BUGBIN) && $(subst -tags=grpcnotrace,-tags=grpcnotrace$(comma)belay_bug,$(GOBUILD)) -o $(BUGBIN)/ ./agent/cmd/belay-agent ./controlplane/cmd/belay-control \
		./controlplane/cmd/belay ./plugins/cmd/belay-plugins ./plugins/process/cmd/belay-supervise
	BELAY_BUG=$(BUG) BELAY_BUG_BIN=$(BUGBIN) $(FAULTTEST) -run '^TestTeeth$$' -runs $(FAULT_RUNS)

test-vm: build ## plugins and units in an emulated Debian with systemd and cgroup v2, and a clock that jumps (slow; VM=clock, containerd, host, process, units)
	@hw-tests/vm/run.sh $(VM)

# Unit tests of what reads hardware, golden inventories by the test binaries and
# by the built plugins. arm is ARMv6, the first Raspberry Pi.
ARMTESTS = plugins/edgetpu plugins/nvidia hw-tests
test-arm: ## detectors built for arm64 and ARMv6, under qemu's user emulation
	@for a in arm64:qemu-aarch64-static arm:qemu-arm-static; do arch=$${a%%:*} emu=$${a#*:} out=$(abspath $(BIN))/test-$${a%%:*}; \
		command -v $$emu >/dev/null || { echo "no $$emu: apt-get install qemu-user-static"; exit 1; }; \
		echo "== building for $$arch"; mkdir -p $$out/plugins; export GOARCH=$$arch GOARM=6 CGO_ENABLED=0; \
		go build $(FLAGS) -ldflags '-s -w' -o $$out/ ./plugins/cmd/belay-plugins ./plugins/cmd/belay-plugin-nvidia; \
		ln -sfn ../belay-plugins $$out/plugins/edgetpu; ln -sfn ../belay-plugin-nvidia $$out/plugins/nvidia; \
		go -C plugins/sdk test -c -o $$out/sysfs.test ./sysfs; \
		for p in $(ARMTESTS); do go test -c -tags=grpcnotrace -o $$out/$$(basename $$p).test ./$$p; done; unset GOARCH GOARM CGO_ENABLED; \
		(cd plugins/sdk/sysfs && timeout 300 $$emu $$out/sysfs.test); \
		for p in $(ARMTESTS); do echo "== $$p on $$arch"; (cd $$p && timeout 300 $$emu $$out/$$(basename $$p).test -test.skip '^(TestTarget|TestContainers.*)$$') || exit 1; done; \
		echo "== built plugins on $$arch"; (cd hw-tests && timeout 300 go test -count=1 . -run '^TestGoldenBuilt$$' -bin $$out -emulator $$emu) || exit 1; \
	done

bench: setup build ## what it costs: memory, latency beside ctr, binary sizes
	@$(GOBUILD) -o $(BIN)/ ./agent/cmd/belay-sim
	go test ./hw-tests/blackbox -run '^$$' -bench . -benchtime 1x -timeout 30m -bin $(abspath $(BIN))

bench-scale: build ## 10,000 simulated devices come back after a restart of the control plane (DEVICES=N)
	@$(GOBUILD) -o $(BIN)/ ./agent/cmd/belay-sim
	BELAY_BENCH_DEVICES=$(or $(DEVICES),10000) go test ./hw-tests/blackbox -run '^$$' -bench '^BenchmarkReconnect$$' -benchtime 1x -timeout 30m -bin $(abspath $(BIN))

bench-idle: setup build ## what an idle device sends and writes in 10 minutes, over QUIC and over TCP (IDLE=10m)
	BELAY_BENCH_IDLE=$(or $(IDLE),10m) go test ./hw-tests/blackbox -run '^$$' -bench '^BenchmarkIdle$$' -benchtime 1x -timeout 2h -bin $(abspath $(BIN))

FUZZTIME ?= 30s
fuzz: ## every fuzz target for FUZZTIME
	@for m in $(MODULES); do (cd $$m && go list -f '{{.Dir}}' ./... | while read -r d; do grep -lE '^func Fuzz' $$d/*_test.go 2>/dev/null || true; done | while read -r f; do \
		grep -oE '^func Fuzz[A-Za-z0-9_]+' $$f | cut -c6- | while read -r n; do \
			echo "== $$n in $$f"; go test -run '^$$' -fuzz "^$$n\$$" -fuzztime $(FUZZTIME) $$(dirname $$f) || exit 1; done || exit 1; done) || exit 1; done

GENOPT = "opt":["module=github.com/belay-edge/belay"]
GENGO  = {"local":"protoc-gen-go","out":".",$(GENOPT)}
BUF    = PATH=$(CURDIR)/.tools:$$PATH buf generate --template

generate: .tools/buf ## every committed *.pb.go and *.connect.go anew
	@$(BUF) '{"version":"v2","plugins":[$(GENGO),{"local":"protoc-gen-go-grpc","out":".",$(GENOPT)}]}' plugins/sdk/internal/pluginpb
	@$(BUF) '{"version":"v2","plugins":[$(GENGO)]}' controlplane/wire
	@$(BUF) '{"version":"v2","plugins":[$(GENGO),{"local":"protoc-gen-connect-go","out":".",$(GENOPT)}]}' controlplane/internal/api/v1

check-generated: generate ## generated code is what the sources say
	@git diff --exit-code -- '*.pb.go' '*.connect.go' || { echo "generated code was out of date: commit what changed"; exit 1; }

.tools/staticcheck: tools/go.mod
	@mkdir -p .tools && echo "building staticcheck" && go -C tools build -o ../.tools/ honnef.co/go/tools/cmd/staticcheck
.tools/buf: tools/go.mod
	@mkdir -p .tools && echo "building the protobuf tools (minutes, once)" && go -C tools build -o ../.tools/ tool

clean:
	rm -rf $(BIN) .tools

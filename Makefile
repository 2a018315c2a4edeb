# make demo   see a machine survive the loss of its server
# make test   everything: unit, simulation, end-to-end
# make lint   formatting, vet, staticcheck
# make help   the rest

SHELL   := /bin/bash
ifeq ($(filter help clean needs-%,$(or $(MAKECMDGOALS),help)),)
export PATH := $(or $(shell scripts/go.sh),$(error no Go))$(if $(PATH),:)$(PATH)
endif
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null)
LDFLAGS := -s -w -X main.version=$(VERSION)
TOOL    := go tool -modfile=tools/go.mod
BUF     := go tool -modfile=tools/buf/go.mod buf
GUEST   := build/tiny.img

# What a fresh Debian lacks: PROOF=PACKAGE for scripts/need.sh.
RUN_NEEDS   := qemu-system-x86_64=qemu-system-x86 qemu-img=qemu-utils ip=iproute2
GUEST_NEEDS := cpio=cpio mkfs.ext4=e2fsprogs sfdisk=fdisk grub-mkimage=grub-common \
	/usr/lib/grub/i386-pc/boot.img=grub-pc-bin xz=xz-utils
TEST_NEEDS  := gcc=gcc /usr/include/stdlib.h=libc6-dev nbdcopy=libnbd-bin nbdsh=python3-libnbd fio=fio \
	mmdebstrap=mmdebstrap fakeroot=fakeroot losetup=mount bzip2=bzip2 /usr/share/OVMF/OVMF_CODE_4M.fd=ovmf \
	debugfs=e2fsprogs mkfs.vfat=dosfstools mcopy=mtools /usr/lib/grub/x86_64-efi/fat.mod=grub-efi-amd64-bin \
	mkfs.xfs=xfsprogs mkfs.btrfs=btrfs-progs curl=curl
CEPH_NEEDS  := ceph-mon=ceph-mon ceph-mgr=ceph-mgr ceph-osd=ceph-osd ceph=ceph-common rbd=ceph-common

.PHONY: help
help: ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort | expand -t 16

.PHONY: build
build: ## bin/argon
	CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o bin/argon ./cmd/argon

.PHONY: deb
deb: build ## bin/argon.deb: program, unit, kernel settings and completion
	@scripts/deb.sh '$(VERSION)' bin/argon.deb

.PHONY: demo
demo: needs-demo build $(GUEST) ## three servers, one machine, one server killed: nothing lost
	bin/argon demo --guest $(GUEST)

.PHONY: needs-demo
needs-demo:
	@scripts/need.sh $(RUN_NEEDS) $(GUEST_NEEDS)

.PHONY: needs-test
needs-test:
	@scripts/need.sh $(RUN_NEEDS) $(GUEST_NEEDS) $(TEST_NEEDS)

.PHONY: needs-ceph
needs-ceph: ## Ceph, which make bench compares with if it is there
	@scripts/need.sh $(CEPH_NEEDS)

$(GUEST): $(wildcard test/guest/*)
	@mkdir -p $(@D)
	test/guest/tiny.sh $@

.PHONY: test
test: needs-test build $(GUEST) ## unit, simulation and end-to-end tests
	go test -race -timeout 15m $$(go list ./... | grep -v '/argon/test/\|/mirror/sim$$')
	go test -timeout 10m ./internal/volume/mirror/sim -seeds 3000 -v
	go test -race -p 1 -timeout 45m ./test/...

SEEDS ?= 20000

.PHONY: sim
sim: ## the volume protocol in a simulated world, SEEDS worlds
	go test -timeout 0 ./internal/volume/mirror/sim -run TestSeeds -seeds $(SEEDS)

.PHONY: sim-forever
sim-forever: ## the same with other seeds each time, until it fails
	while go test -timeout 0 ./internal/volume/mirror/sim -run TestSeeds -seeds $(SEEDS) -first $$(date +%s%N); do :; done

MINUTES ?= 10
SEED ?= 0

.PHONY: soak
soak: needs-test ## five servers that fail for MINUTES while volumes are used (root); SEED=N repeats a run
	go test -timeout 0 ./test/soak -run TestSoak -v -minutes $(MINUTES) -seed $(SEED)

FUZZTIME ?= 30s

.PHONY: fuzz
fuzz: ## every fuzz test, FUZZTIME each, one after the other
	@set -e; for file in $$(git grep -l '^func Fuzz' -- '*_test.go'); do \
		for name in $$(sed -nE 's/^func (Fuzz[A-Za-z0-9_]*).*/\1/p' $$file); do \
			echo "$$name ($$(dirname $$file))"; \
			go test ./$$(dirname $$file) -run '^$$' -fuzz "^$$name\$$" -fuzztime $(FUZZTIME); \
		done; \
	done

.PHONY: bench
bench: needs-test build $(GUEST) ## failover, start, idle and volume measurements; needs-ceph to compare with Ceph
	go test -run '^$$' -bench . -benchtime 1x -v -timeout 120m ./bench/...

.PHONY: lint
lint: ## formatting, vet, staticcheck
	@unformatted=$$($(TOOL) gofumpt -l $$(git ls-files '*.go' ':!*.pb.go' ':!*.connect.go')); \
		if [[ -n $$unformatted ]]; then echo "lint: not formatted, run make format:" $$unformatted >&2; exit 1; fi
	go vet ./...
	$(TOOL) staticcheck ./...

.PHONY: format
format: ## format the Go code
	$(TOOL) gofumpt -w $$(git ls-files '*.go' ':!*.pb.go' ':!*.connect.go')

.PHONY: generate
generate: ## the API's code from api/**/*.proto
	$(BUF) generate

.PHONY: proto-check
proto-check: ## lint the API, and find what breaks old clients or stale code
	$(BUF) lint
	$(BUF) breaking --against '.git#branch=main'
	@out=$$(mktemp -d) && trap 'rm -rf "$$out"' EXIT && $(BUF) generate --output "$$out" && \
		diff -r --exclude='*.proto' "$$out/api" api || { echo "proto-check: generated code is stale: run make generate" >&2; exit 1; }

.PHONY: clean
clean: ## remove what was built
	rm -rf bin build

# Two commands are all that is needed on a fresh machine with Go: `make run` and `make test`.

SHELL := /bin/sh
# The usual place of Go where nobody has put it on PATH.
export PATH := $(PATH):/usr/local/go/bin

# What `pgbroker version` says; without git, what the Go command knows.
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null)

# Passed on: make run ARGS=--ephemeral, make test TESTFLAGS='-run TestPut ./server/...'
ARGS      ?=
TESTFLAGS ?= ./...
FUZZTIME  ?= 10s
export VULNDB

.DEFAULT_GOAL := help

.PHONY: help
help: ## show this
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: run
run: build ## run pgbroker with a private Postgres on 127.0.0.1:5443 (ARGS=--ephemeral keeps nothing)
	@.ci/need postgres
	@exec bin/pgbroker serve $(ARGS)

.PHONY: build
build: ## build bin/pgbroker
	@.ci/need go
	@CGO_ENABLED=0 go build -trimpath $(if $(VERSION),-ldflags '-X main.buildVersion=$(VERSION)') -o bin/pgbroker ./cmd/pgbroker

.PHONY: test
test: build ## run every test with the race detector, on a real Postgres that is gone afterwards
	@.ci/need cc postgres pgbouncer
	@CGO_ENABLED=0 go build -o bin/withpostgres ./db/dbtest/withpostgres
	@exec bin/withpostgres -- env CGO_ENABLED=1 go test -race -timeout 14m $(TESTFLAGS)

# The budget bounds all of it; shorter makes each measurement shorter.
BENCHFLAGS ?= --budget 15m
.PHONY: bench
bench: build ## measure everything on a Postgres of its own, beside what is possible, and write docs/benchmarks.md
	@.ci/need postgres
	@bin/pgbroker bench all --report docs/benchmarks.md $(BENCHFLAGS)

# What chaos is told: for how long, drawn from which seed, beside which older version, with which kinds of
# faults (a regular expression; empty for all).
DURATION ?= 10m
SEED     ?= $(shell date +%s)
PREVIOUS ?= HEAD~1
FAULTS   ?=

.PHONY: chaos
chaos: ## inject faults at random and check all histories (DURATION=10m SEED=1 PREVIOUS=HEAD~1 FAULTS=postgres)
	@.ci/need go postgres
	@go test -count=1 -timeout 0 -v -run '^TestChaos$$' ./server/chaos -chaos.duration $(DURATION) -chaos.seed $(SEED) \
		-chaos.previous '$(PREVIOUS)' -chaos.only '$(FAULTS)' -chaos.skew

.PHONY: fuzz
fuzz: ## run every fuzz target for FUZZTIME=10s; make test runs them on what is in their seed corpora
	@.ci/need go postgres
	@CGO_ENABLED=0 go build -o bin/withpostgres ./db/dbtest/withpostgres
	@.ci/fuzz $(FUZZTIME)

.PHONY: generate
generate: ## regenerate everything that is generated
	go generate ./...

.PHONY: check
check: drift vet lint vuln ## check what is not tested: drift, vet, lint, vuln

.PHONY: drift
drift: ## check that generated files and go.mod are those that their sources make
	@.ci/need go
	@.ci/drift

.PHONY: vet
vet: ## go vet
	@.ci/need go
	go vet ./...

# CGO_ENABLED=0: neither the linter nor the code needs a C compiler.
GOLANGCI := CGO_ENABLED=0 go run github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0

.PHONY: lint
lint: ## check style, layers and common mistakes, as .golangci.yml says
	@.ci/need go
	@$(GOLANGCI) run ./...

.PHONY: fmt
fmt: ## format the code as lint wants it
	@$(GOLANGCI) fmt

.PHONY: vuln
vuln: ## check for known vulnerabilities (needs the network, or VULNDB=file:///...)
	@.ci/need go
	@.ci/vuln

.PHONY: clean
clean: ## remove what was built
	rm -rf bin

GENOPT = "opt":["module=github.com/belay-edge/belay"]
GEN = PATH=$(CURDIR)/.tools:$$PATH buf generate --template

.PHONY: generate
# Regenerates every committed *.pb.go and *.connect.go.
generate: .tools/buf
	$(GEN) '{"version":"v2","plugins":[{"local":"protoc-gen-go","out":".",$(GENOPT)},{"local":"protoc-gen-go-grpc","out":".",$(GENOPT)}]}' plugins/sdk/internal/pluginpb
	$(GEN) '{"version":"v2","plugins":[{"local":"protoc-gen-go","out":".",$(GENOPT)}]}' controlplane/wire
	$(GEN) '{"version":"v2","plugins":[{"local":"protoc-gen-go","out":".",$(GENOPT)},{"local":"protoc-gen-connect-go","out":".",$(GENOPT)}]}' controlplane/internal/api/v1

.tools/buf: tools/go.mod
	mkdir -p .tools && go -C tools build -o ../.tools/ tool

package bridge

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/belay-edge/belay/plugins/sdk"
	pluginv2 "github.com/belay-edge/belay/plugins/sdk/internal/pluginpb/v2"
)

// roundTrip checks that any value comes back the same after it crossed the
// wire, and that no exported field is forgotten: each takes part.
func roundTrip[T any, P proto.Message](t *testing.T, to func(T) P, from func(P) T) {
	t.Helper()
	t.Run(reflect.TypeFor[T]().Name(), rapid.MakeCheck(func(t *rapid.T) {
		v := rapid.Make[T]().Draw(t, "value")
		inRange(reflect.ValueOf(&v).Elem())
		b, err := proto.Marshal(to(v))
		if err != nil {
			t.Fatal(err)
		}
		p := to(*new(T)).ProtoReflect().New().Interface().(P)
		if err := proto.Unmarshal(b, p); err != nil {
			t.Fatal(err)
		}
		// An empty list says what no list says, but for EntryPoint.
		if d := cmp.Diff(v, from(p), cmpopts.EquateEmpty()); d != "" {
			t.Fatalf("(-sent +received):\n%s", d)
		}
	}))
}

// inRange makes generated numbers ones that occur.
func inRange(v reflect.Value) {
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			inRange(v.Field(i))
		}
	case reflect.Pointer:
		if !v.IsNil() {
			inRange(v.Elem())
		}
	case reflect.Slice:
		if raw, ok := v.Addr().Interface().(*json.RawMessage); ok {
			*raw = []byte(text(string(*raw)))
		}
		for i := range v.Len() {
			inRange(v.Index(i))
		}
	case reflect.Int:
		v.SetInt(v.Int() & (1<<30 - 1))
	}
}

func TestEveryTypeRoundTrips(t *testing.T) {
	roundTrip(t, ToInfo, FromInfo)
	roundTrip(t, ToDescription, FromDescription)
	roundTrip(t, ToConfig, FromConfig)
	roundTrip(t, ToRuntimeInfo, FromRuntimeInfo)
	roundTrip(t, ToAttempt, FromAttempt)
	roundTrip(t, ToTaskSpec, FromTaskSpec)
	roundTrip(t, ToPull, FromPull)
	roundTrip(t, ToProgress, FromProgress)
	roundTrip(t, ToImage, FromImage)
	roundTrip(t, ToImages, FromImages)
	roundTrip(t, ToStart, FromStart)
	roundTrip(t, ToInventoryOfDevices, FromInventoryOfDevices)
	roundTrip(t, ToEdits, FromEdits)
	roundTrip(t, ToDeviceStats, FromDeviceStats)
	roundTrip(t, ToInventory, FromInventory)
	roundTrip(t, ToStats, FromStats)
	roundTrip(t, ToExec, FromExec)
	roundTrip(t, ToExecResult, FromExecResult)
}

// Version 1 carries the same but for what it has no words for, which is refused.
func TestVersion1RoundTrips(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		v := rapid.Make[sdk.StartRequest]().Draw(t, "value")
		inRange(reflect.ValueOf(&v).Elem())
		for i := range v.Spec.ExtraHosts { // "address name" in one string
			v.Spec.ExtraHosts[i].Address = strings.ReplaceAll(v.Spec.ExtraHosts[i].Address, " ", "")
		}
		p, err := ToStartV1(v)
		if len(v.Spec.CDIDevices)+len(v.Spec.Hooks)+len(v.Spec.AdditionalGIDs)+len(v.Spec.DeviceRules) > 0 {
			if !errors.Is(err, sdk.Unsupported) {
				t.Fatalf("%+v: %v", v.Spec, err)
			}
			v.Spec.CDIDevices, v.Spec.Hooks, v.Spec.AdditionalGIDs, v.Spec.DeviceRules = nil, nil, nil, nil
			p, err = ToStartV1(v)
		}
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(v, FromStartV1(p), cmpopts.EquateEmpty()); d != "" {
			t.Fatalf("(-sent +received):\n%s", d)
		}
	})
}

// Of an inventory version 1 cannot say how long containers ran.
func TestVersion1Inventory(t *testing.T) {
	i := sdk.Inventory{Containers: []sdk.Container{{PID: 7, RanFor: time.Second}}, Tasks: []string{"t"}}
	got := FromInventoryV1(ToInventoryV1(i))
	i.Containers[0].RanFor = 0
	if d := cmp.Diff(i, got, cmpopts.EquateEmpty()); d != "" {
		t.Errorf("(-sent +received):\n%s", d)
	}
	// What a plugin sends that was built before there was the word.
	old := FromInventory(&pluginv2.ListResponse{Containers: ToInventoryV1(i).Containers, Tasks: []string{"t"}})
	if d := cmp.Diff(i, old, cmpopts.EquateEmpty()); d != "" {
		t.Errorf("without the word (-sent +received):\n%s", d)
	}
}

func TestPresenceIsKept(t *testing.T) {
	zero, none := 0, sdk.Container{}
	if got := FromContainer(ToContainer(sdk.Container{ExitCode: &zero})); got.ExitCode == nil || *got.ExitCode != 0 {
		t.Errorf("exit code 0 became %v", got.ExitCode)
	}
	if got := FromContainer(ToContainer(none)); got.ExitCode != nil {
		t.Errorf("no exit code became %d", *got.ExitCode)
	}
	noSwap, calm := int64(0), uint64(0)
	limits := fromLimits(toLimits(sdk.Limits{MemorySwap: &noSwap, Swappiness: &calm}))
	if limits.MemorySwap == nil || limits.Swappiness == nil {
		t.Errorf("zeros became %+v", limits)
	}
	if limits := fromLimits(toLimits(sdk.Limits{})); limits.MemorySwap != nil || limits.Swappiness != nil {
		t.Errorf("absent limits became %+v", limits)
	}
	cleared := sdk.StartRequest{Spec: sdk.ContainerSpec{EntryPoint: []string{}}}
	if got := FromStart(ToStart(cleared)); got.Spec.EntryPoint == nil {
		t.Error("a cleared entry point became the image's")
	}
	if got := FromStart(ToStart(sdk.StartRequest{})); got.Spec.EntryPoint != nil {
		t.Error("the image's entry point was cleared")
	}
	if got := FromPull(ToPull(sdk.PullRequest{Credentials: &sdk.Credentials{}})); got.Credentials == nil {
		t.Error("empty credentials became none")
	}
	if got := FromConfig(ToConfig(sdk.Config{})); got.JSON != nil {
		t.Error("no configuration became one")
	}
}

func TestOddTextDoesNotBreakAMessage(t *testing.T) {
	c := ToContainer(sdk.Container{Reason: "bad \xff byte", PID: -1})
	if _, err := proto.Marshal(c); err != nil {
		t.Error(err)
	}
	if c.Pid != 0 {
		t.Errorf("pid -1 became %d", c.Pid)
	}
	if err := FromStatus(t.Context(), "", ToStatus(errors.New("bad \xff byte"))); err.Error() != "bad \uFFFD byte" {
		t.Errorf("got %q", err)
	}
}

func TestErrorsKeepTheirKindAndWords(t *testing.T) {
	for kind := range kindCodes {
		sent := &sdk.Error{Kind: kind, Op: "pull x", Message: "no", Hint: "try y", Err: fs.ErrClosed}
		got := FromStatus(t.Context(), "op of the host", ToStatus(sent))
		var e *sdk.Error
		if !errors.Is(got, kind) || !errors.As(got, &e) {
			t.Errorf("%s became %v", kind, got)
			continue
		}
		if e.Op != sent.Op || e.Message != sent.Message || e.Hint != sent.Hint || got.Error() != sent.Error() {
			t.Errorf("%+v became %+v", sent, e)
		}
	}
	for _, c := range []struct {
		name string
		sent error
		kind sdk.ErrorKind
		text string
	}{
		{"wrapped", fmt.Errorf("start: %w", sdk.Errorf(sdk.Conflict, "bind", "port 80 is taken")), sdk.Conflict, "start: bind: port 80 is taken"},
		{"bare kind", sdk.NotFound, sdk.NotFound, "not-found"},
		{"canceled", context.Canceled, sdk.Canceled, "context canceled"},
		{"deadline", fmt.Errorf("x: %w", context.DeadlineExceeded), sdk.Deadline, "x: context deadline exceeded"},
		{"anything", errors.New("oops"), sdk.Internal, "oops"},
		{"unknown kind", &sdk.Error{Kind: "novel", Message: "oops"}, sdk.Internal, "oops"},
	} {
		got := FromStatus(t.Context(), "op of the host", ToStatus(c.sent))
		if sdk.KindOf(got) != c.kind || got.Error() != c.text {
			t.Errorf("%s: got kind %q, %q; want %q, %q", c.name, sdk.KindOf(got), got, c.kind, c.text)
		}
	}
	if ToStatus(nil) != nil || FromStatus(t.Context(), "", nil) != nil {
		t.Error("no error became one")
	}
}

func TestErrorsWithoutDetail(t *testing.T) {
	for code, kind := range map[codes.Code]sdk.ErrorKind{
		codes.NotFound: sdk.NotFound, codes.Unavailable: sdk.Unavailable, codes.Unimplemented: sdk.Unsupported,
		codes.AlreadyExists: sdk.Conflict, codes.Unknown: sdk.Internal, codes.DataLoss: sdk.Internal,
	} {
		if got := FromStatus(t.Context(), "list", status.Error(code, "words")); sdk.KindOf(got) != kind || got.Error() != "list: words" {
			t.Errorf("%s became %q: %v", code, sdk.KindOf(got), got)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if got := FromStatus(ctx, "list", status.Error(codes.Canceled, "grpc words")); !errors.Is(got, context.Canceled) || strings.Contains(got.Error(), "grpc") {
		t.Errorf("got %v", got)
	}
}

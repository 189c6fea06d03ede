package controlplane

import (
	"fmt"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/aws/aws-sdk-go-v2/service/ecs"
	"github.com/aws/aws-sdk-go-v2/service/ecs/types"
	"github.com/google/go-cmp/cmp"
)

// unions are the members of the SDK's union types, which reflection over the
// interface cannot find.
var unions = map[string]map[string]reflect.Type{
	"SharingStrategy": {"nvidiaMps": reflect.TypeFor[types.NvidiaMpsAllocation]()},
}

// ecsFields enumerates the paths of every field of an ECS type.
func ecsFields(t *testing.T, at string, typ reflect.Type) []string {
	t.Helper()
	for typ.Kind() == reflect.Pointer || typ.Kind() == reflect.Slice || typ.Kind() == reflect.Map {
		if typ.Kind() == reflect.Slice && structIn(typ) {
			at += "[]"
		}
		typ = typ.Elem()
	}
	var out []string
	sub := func(name string, typ reflect.Type) {
		path := strings.TrimPrefix(at+"."+name, ".")
		out = append(out, path)
		out = append(out, ecsFields(t, path, typ)...)
	}
	switch typ.Kind() {
	case reflect.Interface:
		members, ok := unions[typ.Name()]
		if !ok {
			t.Fatalf("%s: union %s is not in this test's list", at, typ)
		}
		for name, member := range members {
			sub(name, member)
		}
	case reflect.Struct:
		for i := range typ.NumField() {
			if f := typ.Field(i); f.IsExported() {
				sub(strings.ToLower(f.Name[:1])+f.Name[1:], f.Type)
			}
		}
	}
	return out
}

func structIn(typ reflect.Type) bool {
	for typ.Kind() == reflect.Pointer || typ.Kind() == reflect.Slice {
		typ = typ.Elem()
	}
	return typ.Kind() == reflect.Struct
}

// ourFields enumerates the paths of a Go type by its JSON names.
func ourFields(at string, typ reflect.Type) []string {
	for typ.Kind() == reflect.Pointer || typ.Kind() == reflect.Slice {
		if typ.Kind() == reflect.Slice && structIn(typ) {
			at += "[]"
		}
		typ = typ.Elem()
	}
	if typ.Kind() != reflect.Struct {
		return nil
	}
	var out []string
	for i := range typ.NumField() {
		name, _, _ := strings.Cut(typ.Field(i).Tag.Get("json"), ",")
		if name == "belay" {
			continue
		}
		path := strings.TrimPrefix(at+"."+name, ".")
		out = append(append(out, path), ourFields(path, typ.Field(i).Type)...)
	}
	return out
}

func TestEveryECSFieldIsTreated(t *testing.T) {
	want := ecsFields(t, "", reflect.TypeFor[ecs.RegisterTaskDefinitionInput]())
	var got []string
	for _, r := range TaskDefinitionFields() {
		if slices.Contains(got, r.Path) {
			t.Errorf("%s is in the table twice", r.Path)
		}
		got = append(got, r.Path)
	}
	slices.Sort(want)
	slices.Sort(got)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("fields of ECS and of the table (-ecs +table):\n%s", diff)
	}
}

// What is honoured or kept has a Go field of the same shape; what is refused
// has none.
func TestTreatmentsFitTheTypes(t *testing.T) {
	ours := ourFields("", reflect.TypeFor[TaskDefinition]())
	for _, r := range TaskDefinitionFields() {
		if has := slices.Contains(ours, r.Path); has != (r.Treatment != Refused) {
			t.Errorf("%s is %s; the types have it: %v", r.Path, r.Treatment, has)
		}
		if r.Treatment != Honoured && r.Note == "" {
			t.Errorf("%s is %s without a word of why", r.Path, r.Treatment)
		}
	}
	for _, path := range ours {
		if !slices.ContainsFunc(TaskDefinitionFields(), func(r FieldRule) bool { return r.Path == path }) {
			t.Errorf("%s is no field of ECS: Belay's own belong into the belay object", path)
		}
	}
}

// Only these may be refused, whatever else a device cannot do.
func TestOnlyWhatCannotBeIsRefused(t *testing.T) {
	allowed := []string{"inferenceAccelerators", "proxyConfiguration", "volumes[].efsVolumeConfiguration",
		"volumes[].fsxWindowsFileServerVolumeConfiguration", "volumes[].s3filesVolumeConfiguration",
		"containerDefinitions[].secrets", "containerDefinitions[].firelensConfiguration"}
	for _, r := range TaskDefinitionFields() {
		if r.Treatment == Refused && !slices.ContainsFunc(allowed, func(a string) bool { return strings.HasPrefix(r.Path, a) }) {
			t.Errorf("%s is refused", r.Path)
		}
	}
}

const docPath = "../docs/task-definitions.md"

func TestDocumentedFieldsAreTheTable(t *testing.T) {
	const begin, end = "<!-- fields: begin -->\n", "<!-- fields: end -->"
	text, err := os.ReadFile(docPath)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(text), begin)
	got, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s has lost its markers %q and %q", docPath, begin, end)
	}
	var b strings.Builder
	b.WriteString("\n| field | treatment | what that means |\n|---|---|---|\n")
	for _, r := range TaskDefinitionFields() {
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", r.Path, r.Treatment, r.Note)
	}
	b.WriteString("\n")
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := os.WriteFile(docPath, []byte(before+begin+b.String()+end+after), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if diff := cmp.Diff(b.String(), got); diff != "" {
		t.Errorf("%s is not the table; run the test with UPDATE_GOLDEN=1 (-want +got):\n%s", docPath, diff)
	}
}

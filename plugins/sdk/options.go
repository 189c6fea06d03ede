package sdk

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Configurable is implemented by plugins that say what their configuration
// may hold. The agent checks plugins.d/NAME.toml against it before Configure,
// so that a wrong key or type is an error with the key's name and the plugin
// never sees it. Options is constant and must not fail or block.
type Configurable interface {
	Options() []Option
}

// OptionType is the type of a configuration value.
type OptionType string

// The types. In TOML a duration is a string such as "1m30s".
const (
	TypeString   OptionType = "string"
	TypeInteger  OptionType = "integer"
	TypeNumber   OptionType = "number"
	TypeBoolean  OptionType = "boolean"
	TypeDuration OptionType = "duration"
	TypeStrings  OptionType = "strings" // an array of strings
	TypeTable    OptionType = "table"   // a table, or an array of tables, that only the plugin checks
)

// Option is one key of a plugin's configuration.
type Option struct {
	Name     string
	Type     OptionType
	Help     string
	Default  json.RawMessage // nil: none
	Required bool
	Enum     []string // TypeString and TypeStrings: the values allowed; nil: any
	Min, Max *float64 // numbers; durations in seconds; nil: no bound
}

// OptionsOf derives options from the fields of a struct:
//
//	type config struct {
//		Address string        `json:"address" help:"socket of the daemon" default:"/run/d.sock"`
//		Scan    time.Duration `json:"scan" default:"5s" min:"1" max:"60"`
//		Mode    string        `json:"mode" enum:"fast,safe" required:"true"`
//	}
//
// Pass the struct, zero. It panics on a type it does not know or a tag that
// makes no sense, which a plugin's first test finds.
func OptionsOf(config any) []Option {
	t := reflect.TypeOf(config)
	if t == nil || t.Kind() != reflect.Struct {
		panic(fmt.Sprintf("sdk.OptionsOf: want a struct, got %T", config))
	}
	var options []Option
	for i := range t.NumField() {
		f := t.Field(i)
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		if !f.IsExported() || name == "-" {
			continue
		}
		if name == "" {
			panic(fmt.Sprintf("sdk.OptionsOf: field %s of %s has no json name", f.Name, t))
		}
		o := Option{Name: name, Type: optionType(f.Type), Help: f.Tag.Get("help"), Required: f.Tag.Get("required") == "true"}
		o.Min, o.Max = bound(f, "min"), bound(f, "max")
		if e := f.Tag.Get("enum"); e != "" {
			o.Enum = strings.Split(e, ",")
		}
		if d, ok := f.Tag.Lookup("default"); ok {
			o.Default = defaultOf(o.Type, d)
			if err := o.check(o.Default); err != nil {
				panic(fmt.Sprintf("sdk.OptionsOf: default of field %s of %s: %v", f.Name, t, err))
			}
		}
		options = append(options, o)
	}
	return options
}

func optionType(t reflect.Type) OptionType {
	switch t.Kind() {
	case reflect.String:
		return TypeString
	case reflect.Bool:
		return TypeBoolean
	case reflect.Int64:
		if t == reflect.TypeFor[time.Duration]() {
			return TypeDuration
		}
		return TypeInteger
	case reflect.Int, reflect.Int32, reflect.Uint, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		return TypeInteger
	case reflect.Float64:
		return TypeNumber
	case reflect.Map, reflect.Struct:
		return TypeTable
	case reflect.Slice:
		switch e := t.Elem().Kind(); e {
		case reflect.String:
			return TypeStrings
		case reflect.Map, reflect.Struct:
			return TypeTable
		}
	}
	panic(fmt.Sprintf("sdk.OptionsOf: no option can be of type %s", t))
}

func bound(f reflect.StructField, tag string) *float64 {
	v, ok := f.Tag.Lookup(tag)
	if !ok {
		return nil
	}
	n, err := strconv.ParseFloat(v, 64)
	if err != nil {
		panic(fmt.Sprintf("sdk.OptionsOf: %s of field %s: %v", tag, f.Name, err))
	}
	return &n
}

// defaultOf reads a tag: JSON but for strings, which need no quotes there.
func defaultOf(t OptionType, tag string) json.RawMessage {
	if t == TypeString || t == TypeDuration {
		b, _ := json.Marshal(tag)
		return b
	}
	return json.RawMessage(tag)
}

// CheckConfig says everything that is wrong with a configuration, in one error
// of kind Invalid.
func CheckConfig(options []Option, config json.RawMessage) error {
	table, err := tableOf(config)
	if err != nil {
		return err
	}
	var wrong, known []string
	for _, o := range options {
		known = append(known, o.Name)
		v, given := table[o.Name]
		delete(table, o.Name)
		switch {
		case !given && o.Required && o.Default == nil:
			wrong = append(wrong, fmt.Sprintf("%s is missing (%s)", o.Name, o.want()))
		case given:
			if err := o.check(v); err != nil {
				wrong = append(wrong, fmt.Sprintf("%s: %v", o.Name, err))
			}
		}
	}
	for name := range table {
		wrong = append(wrong, fmt.Sprintf("%s is not known (known: %s)", name, strings.Join(known, ", ")))
	}
	if len(wrong) == 0 {
		return nil
	}
	slices.Sort(wrong)
	return Errorf(Invalid, "read the configuration", "%s", strings.Join(wrong, "; "))
}

// DecodeConfig checks a configuration against the options of the struct that
// into points to and fills it, defaults where nothing was given. Errors are of
// kind Invalid.
func DecodeConfig(c Config, into any) error {
	v := reflect.ValueOf(into)
	if v.Kind() != reflect.Pointer || v.Elem().Kind() != reflect.Struct {
		return Errorf(Internal, "read the configuration", "want a pointer to a struct, got %T", into)
	}
	options := OptionsOf(v.Elem().Interface())
	if err := CheckConfig(options, c.JSON); err != nil {
		return err
	}
	table, err := tableOf(c.JSON)
	if err != nil {
		return err
	}
	for _, o := range options {
		if _, given := table[o.Name]; !given && o.Default != nil {
			table[o.Name] = o.Default
		}
		if o.Type == TypeDuration && table[o.Name] != nil {
			d, _ := duration(table[o.Name])
			table[o.Name] = json.RawMessage(strconv.FormatInt(int64(d), 10))
		}
	}
	b, err := json.Marshal(table)
	if err == nil {
		d := json.NewDecoder(bytes.NewReader(b))
		d.DisallowUnknownFields()
		err = d.Decode(into)
	}
	if err != nil {
		return Errorf(Invalid, "read the configuration", "%w", err)
	}
	return nil
}

// tableOf reads a configuration; no text and JSON's null are an empty one.
func tableOf(config json.RawMessage) (map[string]json.RawMessage, error) {
	var table map[string]json.RawMessage
	if len(config) > 0 {
		if err := json.Unmarshal(config, &table); err != nil {
			return nil, Errorf(Invalid, "read the configuration", "it is no table: %w", err)
		}
	}
	if table == nil {
		table = map[string]json.RawMessage{}
	}
	return table, nil
}

// check says what is wrong with a value.
func (o Option) check(v json.RawMessage) error {
	bad := func() error { return fmt.Errorf("%s is wrong, want %s", clip(v), o.want()) }
	number := func(n float64) error {
		if o.Min != nil && n < *o.Min || o.Max != nil && n > *o.Max {
			return bad()
		}
		return nil
	}
	d := json.NewDecoder(bytes.NewReader(v))
	d.UseNumber()
	var x any
	if err := d.Decode(&x); err != nil {
		return bad()
	}
	switch o.Type {
	case TypeString:
		if s, ok := x.(string); !ok || o.Enum != nil && !slices.Contains(o.Enum, s) {
			return bad()
		}
	case TypeBoolean:
		if _, ok := x.(bool); !ok {
			return bad()
		}
	case TypeInteger, TypeNumber:
		n, ok := x.(json.Number)
		if !ok {
			return bad()
		}
		f, err := n.Float64()
		if err != nil || o.Type == TypeInteger && f != math.Trunc(f) {
			return bad()
		}
		return number(f)
	case TypeDuration:
		dur, ok := duration(v)
		if !ok {
			return bad()
		}
		return number(dur.Seconds())
	case TypeStrings:
		list, ok := x.([]any)
		if !ok {
			return bad()
		}
		for _, e := range list {
			if s, ok := e.(string); !ok || o.Enum != nil && !slices.Contains(o.Enum, s) {
				return bad()
			}
		}
	case TypeTable:
		switch e := x.(type) {
		case map[string]any:
		case []any:
			for _, t := range e {
				if _, ok := t.(map[string]any); !ok {
					return bad()
				}
			}
		default:
			return bad()
		}
	}
	return nil
}

func duration(v json.RawMessage) (time.Duration, bool) {
	var s string
	if json.Unmarshal(v, &s) != nil {
		return 0, false
	}
	d, err := time.ParseDuration(s)
	return d, err == nil
}

// want describes the values allowed.
func (o Option) want() string {
	s := map[OptionType]string{
		TypeString: "a string", TypeInteger: "a whole number", TypeNumber: "a number", TypeBoolean: "true or false",
		TypeDuration: `a duration such as "30s"`, TypeStrings: "an array of strings", TypeTable: "a table",
	}[o.Type]
	if o.Enum != nil {
		s += " of " + strings.Join(o.Enum, ", ")
	}
	unit := ""
	if o.Type == TypeDuration {
		unit = " s"
	}
	if o.Min != nil {
		s += fmt.Sprintf(", at least %g%s", *o.Min, unit)
	}
	if o.Max != nil {
		s += fmt.Sprintf(", at most %g%s", *o.Max, unit)
	}
	return s
}

func clip(v json.RawMessage) string {
	if len(v) > 60 {
		return string(v[:60]) + "..."
	}
	return string(v)
}

package controlplane

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// CPUUnits is a task's CPU limit, 1024 a core. Documents give it as a number,
// as "256", or as ".25 vCPU"; it is written as ECS does, "256".
type CPUUnits int

// MemoryMiB is a task's memory limit. Documents give it as a number, as
// "512", or as "0.5 GB"; it is written as ECS does, "512".
type MemoryMiB int

// MarshalJSON writes the number as a string.
func (c CPUUnits) MarshalJSON() ([]byte, error) { return json.Marshal(strconv.Itoa(int(c))) }

// MarshalJSON writes the number as a string.
func (m MemoryMiB) MarshalJSON() ([]byte, error) { return json.Marshal(strconv.Itoa(int(m))) }

func (c *CPUUnits) fromDocument(n *node) error {
	v, err := sizeFrom(n, "vcpu")
	if err != nil || v < 2 || v > 196608 {
		return fmt.Errorf(`is %s; it must be CPU units such as "256" (1024 a core, from 2 to 196608) or cores such as ".25 vCPU"`, n.describe())
	}
	*c = CPUUnits(v)
	return nil
}

func (m *MemoryMiB) fromDocument(n *node) error {
	v, err := sizeFrom(n, "gb")
	if err != nil || v < minMemoryMiB || v > maxMemoryMiB {
		return fmt.Errorf(`is %s; it must be MiB such as "512" (from %d to %d) or a size such as "0.5 GB"`, n.describe(), minMemoryMiB, maxMemoryMiB)
	}
	*m = MemoryMiB(v)
	return nil
}

// sizeFrom reads a whole number, or a decimal one of a unit of 1024. The
// arithmetic is in integers: a float would round what people wrote.
func sizeFrom(n *node, unit string) (int, error) {
	errSize := errors.New("not a size")
	if n.kind != 's' && n.kind != 'n' {
		return 0, errSize
	}
	text := strings.TrimSpace(n.text)
	if cut := len(text) - len(unit); n.kind == 's' && cut > 0 && strings.EqualFold(text[cut:], unit) {
		whole, fraction, _ := strings.Cut(strings.TrimSpace(text[:cut]), ".")
		if len(whole) > 6 || len(fraction) > 6 || whole+fraction == "" || strings.Trim(whole+fraction, "0123456789") != "" {
			return 0, errSize
		}
		scaled, err := strconv.Atoi((whole + fraction + "000000")[:len(whole)+6])
		return scaled * 1024 / 1_000_000, err
	}
	if strings.Trim(text, "0123456789") != "" || len(text) > 9 {
		return 0, errSize
	}
	return strconv.Atoi(text)
}

package controlplane

import (
	"encoding/base64"
	"iter"
	"slices"
	"strings"
	"time"
)

// Page selects part of a list.
type Page struct {
	Limit int    // 0: 100; at most 1000
	Token string // from the previous page; it survives restarts
}

// paginate sorts by key, which must be unique, and cuts out the page.
func paginate[T any](all []T, page Page, key func(T) string) (part []T, next string, err error) {
	limit := page.Limit
	if limit <= 0 {
		limit = 100
	}
	limit = min(limit, 1000)
	slices.SortFunc(all, func(a, b T) int { return strings.Compare(key(a), key(b)) })
	if page.Token != "" {
		after, err := base64.RawURLEncoding.DecodeString(page.Token)
		if err != nil {
			return nil, "", Errorf(InvalidArgument, "the page token is none that this server gave: begin again without one")
		}
		i, found := slices.BinarySearchFunc(all, string(after), func(v T, k string) int { return strings.Compare(key(v), k) })
		if found {
			i++
		}
		all = all[i:]
	}
	if len(all) > limit {
		all = all[:limit]
		next = base64.RawURLEncoding.EncodeToString([]byte(key(all[limit-1])))
	}
	return all, next, nil
}

// byTime is a key that sorts by time of creation.
func byTime(t time.Time, id string) string { return t.UTC().Format("20060102T150405.000") + id }

// minPrefix is how many digits of an id may stand for it.
const minPrefix = 4

// matching returns the ids equal to id or, of at least minPrefix digits,
// beginning with it.
func matching(ids iter.Seq[string], id string) (found []string) {
	for k := range ids {
		if k == id {
			return []string{k}
		}
		if len(id) >= minPrefix && strings.HasPrefix(k, id) {
			found = append(found, k)
		}
	}
	return found
}

// find resolves an id or a unique prefix of one.
func (p *Plane) find(noun, id string, lookup func(*records) []string) (string, error) {
	if len(id) < minPrefix || len(id) > 32 || !isHex(id) {
		return "", Errorf(InvalidArgument, "%s %q: want an id of 32 hex digits, or at least its first %d", noun, id, minPrefix)
	}
	var found []string
	p.state.read(func(r *records, _ int64) { found = lookup(r) })
	switch len(found) {
	case 0:
		return "", Errorf(NotFound, "no %s %s: belay %s list shows those there are", noun, id, noun)
	case 1:
		return found[0], nil
	}
	slices.Sort(found)
	return "", Errorf(InvalidArgument, "%s %s is ambiguous: %s and %d more begin so; give more digits", noun, id, found[0], len(found)-1)
}

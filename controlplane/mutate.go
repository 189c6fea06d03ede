package controlplane

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"time"
)

// tokenRecord is the answer to a mutating call, written in the transaction
// that made the change, so that the same call repeated changes nothing twice.
type tokenRecord struct {
	Operation string          `json:"operation"`
	Request   []byte          `json:"request"` // hash of it
	Result    json.RawMessage `json:"result"`
	CreatedAt time.Time       `json:"createdAt"`
}

// change is one transaction to be tried. No ops: there is nothing to do.
type change struct {
	compares []Compare
	ops      []Op
}

func (c *change) compare(key string, mod int64) { c.compares = append(c.compares, Compare{key, mod}) }
func (c *change) delete(key string)             { c.ops = append(c.ops, Delete(key)) }

func (c *change) put(key string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encoding %s: %w", key, err)
	}
	c.ops = append(c.ops, Put(key, b))
	return nil
}

// mutate tries what build makes of the current state until it is committed,
// at most maxTries times; build is called anew after each lost race. With a
// token, the call's answer is kept and given again to a repetition; request
// is what tells a repetition from another call with the same token. It
// returns once memory has the change.
func mutate[R any](ctx context.Context, p *Plane, operation, token string, request any, build func() (*change, R, error)) (R, int64, error) {
	var none R
	ctx, cancel := context.WithTimeout(ctx, operationTimeout)
	defer cancel()
	if err := p.begin(ctx); err != nil {
		return none, 0, err
	}
	var record *tokenRecord
	if token != "" {
		if len(token) > 128 {
			return none, 0, Errorf(InvalidArgument, "the client token has %d bytes, at most 128 are allowed", len(token))
		}
		body, err := json.Marshal(request)
		if err != nil {
			return none, 0, fmt.Errorf("encoding the request: %w", err)
		}
		record = &tokenRecord{Operation: operation, Request: hash([]byte(operation), body)}
	}
	for try := range maxTries {
		if try == 1 {
			if err := p.contended.lock(ctx); err != nil {
				return none, 0, err
			}
			defer p.contended.unlock()
		}
		if record != nil {
			answer, revision, found, err := replay[R](ctx, p, token, record)
			if found || err != nil {
				return answer, revision, err
			}
		}
		c, result, err := build()
		if record != nil && (err != nil || c == nil || len(c.ops) == 0) {
			// The call that this one repeats may still have been under way and
			// be the reason: the room it took, the object it deleted.
			answer, revision, found, err := replay[R](ctx, p, token, record)
			if found || err != nil {
				return answer, revision, err
			}
		}
		if err != nil {
			return none, 0, err
		}
		if c == nil || len(c.ops) == 0 {
			return result, p.state.at(), nil
		}
		if record != nil {
			record.CreatedAt = p.now()
			if record.Result, err = json.Marshal(result); err != nil {
				return none, 0, fmt.Errorf("encoding the result: %w", err)
			}
			c.compare(tokenKey(token), 0)
			if err := c.put(tokenKey(token), record); err != nil {
				return none, 0, err
			}
		}
		revision, ok, err := p.store.Txn(ctx, c.compares, c.ops)
		if err != nil {
			return none, 0, fmt.Errorf("%s: %w", operation, err)
		}
		if ok {
			p.wrote(revision)
		}
		// Memory that lags makes the next try lose too; it is no reason to fail.
		if err := p.caughtUp(ctx, revision); err != nil && ok {
			p.log.Warn("memory lags behind the store", "revision", revision, "error", err)
		}
		if ok {
			return result, revision, nil
		}
	}
	return none, 0, Errorf(Conflict, "%s: others kept changing the same objects, %d tries failed: try again", operation, maxTries)
}

// replay finds the answer of an earlier call with the token.
func replay[R any](ctx context.Context, p *Plane, token string, want *tokenRecord) (answer R, revision int64, found bool, err error) {
	kv, err := p.store.Get(ctx, tokenKey(token))
	if err != nil || kv.ModRevision == 0 {
		return answer, 0, false, err
	}
	var have tokenRecord
	if err := json.Unmarshal(kv.Value, &have); err != nil {
		return answer, 0, false, fmt.Errorf("reading the record of the client token: %w", err)
	}
	if have.Operation != want.Operation || !bytes.Equal(have.Request, want.Request) {
		return answer, 0, false, Errorf(InvalidArgument,
			"the client token was used before, for another request (%s at %s): use a new token for a new request", have.Operation, have.CreatedAt.Format(time.RFC3339))
	}
	if err := json.Unmarshal(have.Result, &answer); err != nil {
		return answer, 0, false, fmt.Errorf("reading the record of the client token: %w", err)
	}
	return answer, kv.ModRevision, true, p.caughtUp(ctx, kv.ModRevision)
}

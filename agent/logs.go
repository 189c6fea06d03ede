package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/plugins/sdk"
)

const (
	logChunk = 32 << 10
	// logTailMost bounds what is kept in memory of an output that cannot be
	// read backwards.
	logTailMost = 1 << 20
)

// Logs copies a container's kept output: stdout first, then stderr, as it is
// now; what is written meanwhile is not followed.
func (a *Agent) Logs(ctx context.Context, r *wire.LogsRequest, chunk func(stream string, data []byte) error) error {
	var at sdk.Attempt
	var err error
	if asked := a.ask(ctx, func(s *State) { at, err = s.latest(r) }); asked != nil {
		return asked
	}
	if err != nil {
		return err
	}
	for _, stream := range [...]string{"stdout", "stderr"} {
		in, err := a.cfg.Outputs.Read(at, stream)
		if errors.Is(err, sdk.NotFound) {
			continue
		}
		if err != nil {
			return fmt.Errorf("read %s of %s: %w", stream, at, err)
		}
		err = copyTail(ctx, in, int(r.GetTail()), func(b []byte) error { return chunk(stream, b) })
		if cerr := in.Close(); err == nil {
			err = cerr
		}
		if err != nil {
			return fmt.Errorf("copy %s of %s: %w", stream, at, err)
		}
	}
	return nil
}

// copyTail passes on the last lines of in, or all of it when lines is 0, in
// chunks.
func copyTail(ctx context.Context, in io.Reader, lines int, chunk func([]byte) error) error {
	seeker, ok := in.(io.ReadSeeker)
	if !ok {
		if lines > 0 {
			return copyTailForward(ctx, in, lines, chunk)
		}
		return copyChunks(ctx, in, chunk)
	}
	end, err := seeker.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	start := int64(0)
	if lines > 0 {
		if start, err = tailOffset(ctx, seeker, end, lines); err != nil {
			return err
		}
	}
	if _, err := seeker.Seek(start, io.SeekStart); err != nil {
		return err
	}
	// A container that writes faster than the link must not hold us for ever.
	return copyChunks(ctx, io.LimitReader(seeker, end-start), chunk)
}

// tailOffset finds where the last lines begin, reading backwards from end. An
// unterminated last line counts as one.
func tailOffset(ctx context.Context, in io.ReadSeeker, end int64, lines int) (int64, error) {
	buf := make([]byte, logChunk)
	last := end - 1 // a line feed here ends the last line, it begins none
	for pos := end; pos > 0; {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		n := min(pos, int64(len(buf)))
		pos -= n
		if _, err := in.Seek(pos, io.SeekStart); err != nil {
			return 0, err
		}
		if _, err := io.ReadFull(in, buf[:n]); err != nil {
			return 0, err
		}
		for i := n - 1; i >= 0; i-- {
			if buf[i] != '\n' || pos+i == last {
				continue
			}
			if lines--; lines == 0 {
				return pos + i + 1, nil
			}
		}
	}
	return 0, nil
}

// copyTailForward keeps the end of a stream that can only be read forwards.
func copyTailForward(ctx context.Context, in io.Reader, lines int, chunk func([]byte) error) error {
	var kept []byte
	err := copyChunks(ctx, in, func(b []byte) error {
		kept = append(kept, b...)
		if over := len(kept) - logTailMost; over > 0 {
			kept = append(kept[:0], kept[over:]...)
		}
		return nil
	})
	if err != nil {
		return err
	}
	r := bytes.NewReader(kept)
	return copyTail(ctx, r, lines, chunk)
}

func copyChunks(ctx context.Context, in io.Reader, chunk func([]byte) error) error {
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		buf := make([]byte, logChunk) // each its own: the receiver may queue it
		n, err := io.ReadFull(in, buf)
		if n > 0 {
			if err := chunk(buf[:n]); err != nil {
				return err
			}
		}
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return nil
		case err != nil:
			return err
		}
	}
}

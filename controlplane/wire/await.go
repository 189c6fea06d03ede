package wire

import (
	"fmt"
	"io"
)

// ignorable is how many unknown frames are skipped where one known frame is due.
const ignorable = 64

// Await reads until a frame that want accepts, skipping frames with bodies
// this build does not know. Any other frame, one larger than MaxFirstFrame, or
// too many to skip are ErrFrame. It is for the beginning of streams, where one
// frame is due and the peer is not known yet; the caller sets a deadline.
func Await(r io.Reader, want func(*Frame) bool) (*Frame, error) {
	for range ignorable {
		f, err := ReadFrameMax(r, MaxFirstFrame)
		if err != nil {
			return nil, err
		}
		if f.Body == nil {
			continue
		}
		if want(f) {
			return f, nil
		}
		return nil, fmt.Errorf("%w of those that may come here: %s", ErrFrame, f.Kind())
	}
	return nil, fmt.Errorf("%w of those that may come here, %d times", ErrFrame, ignorable)
}

package agent

import "time"

// Unused is on record: how long images have been unused while the device was on.
type Unused struct {
	Images []UnusedImage `json:"images,omitempty"`
}

// UnusedImage is one image of one runtime.
type UnusedImage struct {
	Runtime string        `json:"runtime"`
	Digest  string        `json:"digest"`
	For     time.Duration `json:"for"`
}

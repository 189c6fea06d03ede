// Package belay holds the tests that keep the repository in the shape its
// design promises. Start reading at README.md.
package belay

// Package hwtests holds detectors to what is known of hardware. Of boards
// nobody has at hand there are recorded trees, each with the inventory it must
// give; of the machine at hand, or of one behind ssh, it asks the built plugins
// what is there and uses every device from a container:
//
//	go test ./hw-tests -v -target=local -bin $PWD/bin
//	go test ./hw-tests -v -target=ssh://user@board
//
// What the machine cannot show is skipped, with the reason.
package hwtests

package tmpdeps

import (
	_ "github.com/google/go-cmp/cmp"
	_ "github.com/hashicorp/go-plugin"
	_ "google.golang.org/grpc"
	_ "pgregory.net/rapid"
)

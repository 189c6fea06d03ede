package bridge

import (
	"github.com/belay-edge/belay/plugins/sdk"
	pluginv2 "github.com/belay-edge/belay/plugins/sdk/internal/pluginpb/v2"
)

// ToImages carries what an image store has.
func ToImages(i sdk.ImageInventory) *pluginv2.ImagesResponse {
	return &pluginv2.ImagesResponse{
		Images: mapSlice(i.Images, func(s sdk.StoredImage) *pluginv2.StoredImage {
			return &pluginv2.StoredImage{Digest: text(s.Digest), References: mapSlice(s.References, text), Bytes: s.Bytes, InUse: s.InUse}
		}),
		Disk: &pluginv2.Disk{TotalBytes: i.Disk.TotalBytes, FreeBytes: i.Disk.FreeBytes},
	}
}

// FromImages reads what ToImages wrote.
func FromImages(p *pluginv2.ImagesResponse) sdk.ImageInventory {
	return sdk.ImageInventory{
		Images: mapSlice(p.GetImages(), func(s *pluginv2.StoredImage) sdk.StoredImage {
			return sdk.StoredImage{Digest: s.GetDigest(), References: s.GetReferences(), Bytes: s.GetBytes(), InUse: s.GetInUse()}
		}),
		Disk: sdk.Disk{TotalBytes: p.GetDisk().GetTotalBytes(), FreeBytes: p.GetDisk().GetFreeBytes()},
	}
}

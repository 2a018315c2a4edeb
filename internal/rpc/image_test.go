package rpc

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"testing"

	"connectrpc.com/connect"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/image"
)

// Etcd was asked to record an image, and has not answered: the data stays. It goes
// where it is known that there is no record.
func TestImageThatMayBeRecorded(t *testing.T) {
	w := newWorld(t)
	store, err := catalog.Open(t.Context(), w.etcd.Client("slow"))
	w.must(err)
	slow := *w.parts
	slow.Store = store
	staged := func(id string) *image.Staged {
		staged, err := w.parts.Images.Import(t.Context(), id, image.Request{Data: bytes.NewReader(disk(mib))}, func(image.Progress) {})
		w.must(err)
		return staged
	}
	isHere := func(id string) bool {
		f, err := w.parts.Images.Open(id)
		if err == nil {
			_ = f.Close()
		}
		return err == nil
	}
	first, late, twice := catalog.NewID(), catalog.NewID(), catalog.NewID()
	w.must(slow.recordImage(t.Context(), first, &argonv1.ImportImageRequest_Header{Name: "first"}, staged(first)))
	w.etcd.Freeze("slow")
	err = slow.recordImage(t.Context(), late, &argonv1.ImportImageRequest_Header{Name: "late"}, staged(late))
	wantError(t, err, connect.CodeUnavailable, "")
	if !isHere(late) {
		t.Error("data that may be recorded is gone")
	}
	w.etcd.Thaw("slow")

	err = w.parts.recordImage(t.Context(), twice, &argonv1.ImportImageRequest_Header{Name: "first"}, staged(twice))
	wantError(t, err, connect.CodeAlreadyExists, "first")
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if err := w.parts.recordImage(gone, twice, &argonv1.ImportImageRequest_Header{Name: "gone"}, staged(twice)); !errors.Is(err, context.Canceled) {
		t.Errorf("the caller is gone: %v", err)
	}
	if isHere(twice) {
		t.Error("data that is not recorded is left")
	}
}

// An image may have hundreds of clones, which one transaction detaches.
func TestImageOfMany(t *testing.T) {
	w := newWorld(t)
	_, err := w.importImage(&argonv1.ImportImageRequest_Header{Name: "debian"}, disk(mib))
	w.must(err)
	st, err := w.parts.fresh(t.Context())
	w.must(err)
	debian, _ := byName(st.Images, "debian")
	const many = 300
	txn := w.store.Txn()
	for i := range many {
		txn.Create(&argonv1.Volume{Meta: &argonv1.Meta{Name: fmt.Sprint("v", i)}, SizeBytes: mib, Base: &argonv1.Base{ImageId: debian.GetMeta().GetId()}})
	}
	w.must(txn.Commit(t.Context()))
	res, err := call(t, w.images.RemoveImage, &argonv1.RemoveImageRequest{Name: "debian", Detach: true})
	if err != nil || len(res.GetWaitsFor()) != many {
		t.Errorf("waits for %d volumes, %v", len(res.GetWaitsFor()), err)
	}
}

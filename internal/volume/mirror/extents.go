package mirror

// extent is a stretch of a volume.
type extent struct {
	n    int64
	hole bool
}

// maxExtents bounds what is looked up at once.
const maxExtents = 512

// Extents implements nbd.Extents, where the holder's own server has a replica
// in sync; elsewhere nothing is known. See there for what is promised: the
// replica is trusted before and after it is asked, so that it had every
// acknowledged write in between.
func (a *Attachment) Extents(off, length int64, found func(n int64, hole, zero bool) (more bool)) error {
	link := a.nearLink()
	if link == nil {
		return nil
	}
	var list []extent
	err := link.copy.Extents(off, length, func(n int64, hole bool) bool {
		list = append(list, extent{n, hole})
		return len(list) < maxExtents
	})
	if err != nil || a.nearLink() != link {
		return nil // whoever reads finds out what is wrong
	}
	for _, e := range list {
		if !found(e.n, e.hole, e.hole) {
			break
		}
	}
	return nil
}

// nearLink is the link to the replica on this server, nil if that cannot be
// trusted now.
func (a *Attachment) nearLink() *localLink {
	a.mu.Lock()
	defer a.mu.Unlock()
	r := a.runners[a.opts.Config.Near]
	if r == nil || !a.core.Trusts(a.opts.Config.Near) {
		return nil
	}
	link, _ := r.link.(*localLink)
	return link
}

// Package sim runs the volume protocol in a simulated world: the holder's core
// (mirror), the replicas' rules (replica) and their files (layer, over a
// simulated file system) are the production code; the network, the disks, the
// catalog, time and chance are simulated. One seed is one run, always the
// same.
//
// What lives here: the world, the faults, the checker of the promise. What
// must not: any rule of the protocol. The checker knows only what a client
// sees.
//
// A new kind of fault goes into faults.go; what a holder's shell does goes
// into holder.go and must stay the counterpart of mirror.Attachment.
package sim

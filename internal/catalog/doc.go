// Package catalog keeps the cluster's records in etcd.
//
// What lives here: typed tables (get, list, create, compare-and-swap, delete),
// transactions over several records, leases, secrets, events, and View, the
// cached copy of everything that level-triggered loops work from. What must
// not: what the records mean. Nothing here decides.
//
// Keys, all below /argon/:
//
//	schema                     the layout's version, in decimal
//	state/cluster              the Cluster
//	state/<kind>/<id>          a record, protobuf
//	state/lease/<server id>    a Lease, bound to the server's etcd lease
//	names/<kind>/<name>        the id of the record of that name
//	tokens/<id>                a Token
//	events/<id>                an Event
//	secrets/<name>             bytes
//
// View follows state/ and nothing else: what loops do not work from stands
// beside it, so that it wakes nobody.
//
// All reads are linearizable. Every write of a record is an etcd transaction
// whose guards are the revisions that the caller has read: there are no locks.
package catalog

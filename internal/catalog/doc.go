// Package catalog keeps the cluster's records in etcd.
//
// What lives here: typed tables (get, list, create, compare-and-swap, delete),
// transactions over several records, leases, secrets, events, and View, the
// cached copy of everything that level-triggered loops work from. What must
// not: what the records mean. Nothing here decides.
//
// Keys, all below /argon/:
//
//	schema                the layout's version, in decimal
//	cluster               the Cluster
//	<kind>/<id>           a record, protobuf
//	names/<kind>/<name>   the id of the record of that name
//	leases/<server id>    a Lease, bound to the server's etcd lease
//	events/<id>           an Event, bound to an etcd lease of a week
//	secrets/<name>        bytes
package catalog

// Package scripts tests what is in this folder: scripts that make calls.
package scripts

package datastore

import "context"

// KindOutside is the kind of a snapshot's datastore that is not in the snapshot.
const KindOutside = "outside"

// Outside implements snapshot.Source for a datastore outside of this server: only its own tools save what is in it. A
// snapshot has the rest, without which its content is of no use: authorities, keys, tokens and settings.
type Outside struct{}

// Kind implements snapshot.Source.
func (Outside) Kind() string { return KindOutside }

// Save implements snapshot.Source. It writes nothing.
func (Outside) Save(context.Context, string) (revision int64, err error) { return 0, nil }

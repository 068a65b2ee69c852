package rowstore

import "strconv"

// Literal quotes text as a value in LogsQL, whatever is in it.
func Literal(text string) string { return strconv.Quote(text) }

// FieldName quotes a field's name for LogsQL. Only before a colon, in {…} and in by (…) is it a name; FieldName("_time") is still the row's time.
func FieldName(name string) string { return strconv.Quote(name) }

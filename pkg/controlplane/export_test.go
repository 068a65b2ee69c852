package controlplane

// ReconcileRoles is for tests from outside of the package: those that start a control plane cannot be inside.
var ReconcileRoles = reconcileRoles

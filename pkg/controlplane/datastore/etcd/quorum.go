package etcd

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Quorum counts the members that vote: etcd works while a majority of them answers each other.
type Quorum struct {
	Voters, Answering int
	// Away are the voters that do not answer.
	Away []Member
}

// QuorumOf counts members. A learner has no vote, and a member that has not started does not answer.
func QuorumOf(members []Member) Quorum {
	var q Quorum
	for _, m := range members {
		switch {
		case m.Learner:
			continue
		case m.Problem != "":
			q.Away = append(q.Away, m)
		default:
			q.Answering++
		}
		q.Voters++
	}
	return q
}

// Majority is how many voters must answer.
func (q Quorum) Majority() int { return q.Voters/2 + 1 }

// Has reports whether a majority answers.
func (q Quorum) Has() bool { return q.Answering >= q.Majority() }

// Missing lists the members that do not answer, and why.
func (q Quorum) Missing() string {
	var all []string
	for _, m := range q.Away {
		all = append(all, fmt.Sprintf("%s (%s)", m, m.Problem))
	}
	return strings.Join(all, ", ")
}

// LastMemberError is the error of removing the only member that votes.
type LastMemberError struct{ Node string }

func (err *LastMemberError) Error() string {
	return err.Node + " is the only member of etcd that has the cluster's data: `polymesh reset` on it removes the whole cluster"
}

// QuorumError is the error of removing a member without which etcd would have no majority, or while it has none.
type QuorumError struct{ message string }

func (err *QuorumError) Error() string { return err.message }

// Works returns a QuorumError while etcd has no majority that answers.
func Works(members []Member) error {
	if q := QuorumOf(members); !q.Has() {
		return &QuorumError{fmt.Sprintf("%s, which is no majority of etcd: no member can be removed until another one is started: %s. If this machine is cut off from the others, they continue the cluster. If their machines are lost, `polymesh server --cluster-reset` on a server that is left makes a cluster of it alone",
			answer(q, "members"), q.Missing())}
	}
	return nil
}

// MayRemove returns nil if etcd can remove the member with this id, and the others are a majority that answers afterwards. Otherwise it
// returns a LastMemberError or a QuorumError, which contains the numbers and what to do.
func MayRemove(members []Member, id uint64) error {
	i := slices.IndexFunc(members, func(m Member) bool { return m.ID == id })
	if i < 0 {
		return errors.New("etcd has no such member")
	}
	now, member := QuorumOf(members), members[i]
	after := QuorumOf(slices.Concat(members[:i], members[i+1:]))
	if after.Voters == 0 {
		return &LastMemberError{member.String()}
	}
	if err := Works(members); err != nil {
		return err
	}
	if !member.Learner && !after.Has() {
		return &QuorumError{fmt.Sprintf("%s; removing %s would leave %s, which is no majority, and the cluster would stop: start these first: %s",
			answer(now, "members"), member, leaves(after), after.Missing())}
	}
	return nil
}

// answer is "2 of 3 members answer".
func answer(q Quorum, what string) string {
	return fmt.Sprintf("%d of %d %s %s", q.Answering, q.Voters, what, verb(q.Answering))
}

// leaves is "2 members of which 1 answers".
func leaves(q Quorum) string {
	members := "members"
	if q.Voters == 1 {
		members = "member"
	}
	return fmt.Sprintf("%d %s of which %d %s", q.Voters, members, q.Answering, verb(q.Answering))
}

func verb(n int) string {
	if n == 1 {
		return "answers"
	}
	return "answer"
}

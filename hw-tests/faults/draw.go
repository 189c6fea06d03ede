package faults

import "math/rand/v2"

// phases of a task's life that faults are aimed at.
const (
	inPull    = "pull"
	inStart   = "start"
	inRun     = "run"
	inHealth  = "health"
	inRestart = "restart"
	inStop    = "stop"
	inCleanup = "clean-up"
)

var phases = []string{inPull, inStart, inRun, inHealth, inRestart, inStop, inCleanup}

// card is one fault to be: what, and in which phase of a task.
type card struct {
	kind  int // index of kinds
	phase string
}

// deal says which faults a run gets. All pairs of kind and phase make a deck;
// decks are shuffled by the seed and dealt one after the other, so that all
// pairs come up equally often however many runs there are, and run n of a seed
// is the same whether or not the ones before it were run.
func deal(seed uint64, n int) []card {
	var dealt []card
	deck, hand := 0, 0
	rnd := rand.New(rand.NewPCG(seed, 1))
	var rest []card
	for run := 0; run <= n; run++ {
		dealt = nil
		hand = 7 + rnd.IntN(2)
		for len(dealt) < hand {
			if len(rest) == 0 {
				deck++
				rest = shuffled(seed, deck)
			}
			dealt = append(dealt, rest[0])
			rest = rest[1:]
		}
	}
	return dealt
}

func shuffled(seed uint64, deck int) []card {
	var all []card
	for k := range kinds {
		for _, p := range phases {
			all = append(all, card{k, p})
		}
	}
	rnd := rand.New(rand.NewPCG(seed, uint64(deck)<<32))
	rnd.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	return all
}

// dice are the other choices of run n: how long, how late, which task.
func dice(seed uint64, n int) *rand.Rand { return rand.New(rand.NewPCG(seed, uint64(n)<<16|7)) }

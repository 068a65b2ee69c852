package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"polymesh.dev/polymesh/pkg/atomicfile"
	"polymesh.dev/polymesh/pkg/imagestore"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/progress"
	"polymesh.dev/polymesh/pkg/signature"
	"polymesh.dev/polymesh/pkg/workflow/image"
	"polymesh.dev/polymesh/pkg/workflow/scanner"
)

func newImage() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "image",
		Short: "Load images, scan them, list their contents, sign and verify them, build base images",
	}
	cmd.AddCommand(newImageLoad(), newImageScan(), newImageSBOM(), newImageDB(), newImageKeygen(), newImageSign(), newImageVerify(), newImageBases())
	return cmd
}

// imageFlags adds flags for the location of an image. The returned function opens a reader for it; close it.
func imageFlags(cmd *cobra.Command) (from *string, open func() (image.Reader, error)) {
	var engine string
	var dataDir layout.DataDir
	from = cmd.Flags().String("from", "", "where the image is: "+strings.Join(image.Origins(), ", ")+" (default: the first that has it)")
	cmd.Flags().StringVar(&engine, "engine", "", "the program whose storage is searched: "+strings.Join(image.EngineNames(), ", ")+" (default: the first that works)")
	dataDirFlag(cmd, &dataDir)
	complete(cmd, "from", image.Origins())
	complete(cmd, "engine", image.EngineNames())
	cmd.ValidArgsFunction = completeImages(&dataDir)
	return from, func() (image.Reader, error) {
		if err := image.CheckOrigin(*from); err != nil {
			return image.Reader{}, err
		}
		return image.OpenReader(dataDir, engine)
	}
}

// completeImages completes names of the node's images, and files.
func completeImages(dataDir *layout.DataDir) cobra.CompletionFunc {
	return func(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
		store, err := imagestore.Open(dataDir.ContainerdSocket())
		if err != nil {
			return nil, cobra.ShellCompDirectiveDefault
		}
		defer store.Close()
		names, err := store.Names(cmd.Context())
		if err != nil {
			return nil, cobra.ShellCompDirectiveDefault
		}
		return names, cobra.ShellCompDirectiveDefault
	}
}

func databaseFlag(cmd *cobra.Command) *string {
	return cmd.Flags().String("db", "", "folder of the vulnerability database (default: in the user's cache)")
}

func complete(cmd *cobra.Command, flag string, values []string) {
	_ = cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp))
}

// formatFlag adds -o with a list of formats, the first of which is the default.
func formatFlag(cmd *cobra.Command, formats []string) func() (string, error) {
	format := cmd.Flags().StringP("output", "o", formats[0], "output format: "+strings.Join(formats, ", "))
	complete(cmd, "output", formats)
	return func() (string, error) {
		if !slices.Contains(formats, *format) {
			return "", fmt.Errorf("--output %q is not one of %s", *format, strings.Join(formats, ", "))
		}
		return *format, nil
	}
}

func newImageScan() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "scan IMAGE...",
		Short: "List the known vulnerabilities of images",
		Long: `Scan lists the known vulnerabilities of packages in images: those of the distribution, and of Go, Python,
Java, Node.js, Rust and others. IMAGE is a name, or a file (an OCI or Docker archive). It needs no network, but a database:
see polymesh image db.

The exit code is 0 if the scan succeeded, 2 if --fail-on found something, and 1 on an error.`,
		Example: `  polymesh image scan shop/api:1.0.0-1c9cb0007a65
  polymesh image scan --fail-on high --only-fixed registry.example.com/team/api:1.0.0
  polymesh image scan -o sarif api.tar > api.sarif`,
		Args: someArgs("an image: its name, or a file"),
	}
	from, open := imageFlags(cmd)
	format := formatFlag(cmd, scanner.ReportFormats())
	failOn := cmd.Flags().String("fail-on", "", "exit code 2 if there is a vulnerability of this severity or worse: "+strings.Join(scanner.Severities(), ", "))
	onlyFixed := cmd.Flags().Bool("only-fixed", false, "leave out vulnerabilities without a fixed version")
	maxAge := cmd.Flags().Duration("max-db-age", scanner.MaxDatabaseAge, "how old the database may be; 0 for any age")
	database := databaseFlag(cmd)
	complete(cmd, "fail-on", scanner.Severities())
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		output, err := format()
		if err != nil {
			return err
		}
		if *failOn != "" && !slices.Contains(scanner.Severities(), *failOn) {
			return fmt.Errorf("--fail-on %q is not one of %s", *failOn, strings.Join(scanner.Severities(), ", "))
		}
		if len(args) > 1 && output != scanner.ReportFormats()[0] {
			return fmt.Errorf("--output %s is one document: scan one image at a time", output)
		}
		reader, err := open()
		if err != nil {
			return err
		}
		defer reader.Close()
		s, err := scanner.Find(os.Args[0], *database)
		if err != nil {
			return err
		}
		ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
		defer stop()
		db, err := s.Status(ctx)
		if err != nil {
			return err
		}
		if err := scanner.CheckAge(db, *maxAge, time.Now()); err != nil {
			return err
		}
		steps := progress.New(cmd.ErrOrStderr())
		steps.Print("database of %s, %s old", db.Built.Format(time.DateOnly), scanner.Days(db.Age(time.Now())))
		found := false
		for _, ref := range args {
			report := &strings.Builder{}
			err := read(ctx, steps, "scan", reader, ref, *from, func(i scanner.Image) error {
				return s.Scan(ctx, i, output, *failOn, *onlyFixed, report)
			})
			if _, printErr := io.WriteString(cmd.OutOrStdout(), forPeople(output, report.String())); printErr != nil {
				return printErr
			}
			if errors.Is(err, scanner.ErrFound) {
				found, err = true, nil
			}
			if err != nil {
				return err
			}
		}
		if found {
			fmt.Fprintf(cmd.ErrOrStderr(), "\npolymesh: there are vulnerabilities of severity %s or worse\n", *failOn)
			return exitError(2)
		}
		return nil
	}
	return cmd
}

// forPeople returns a report for printing. A table contains names chosen by the author of an image; the other formats are for
// programs.
func forPeople(format, report string) string {
	if format == "table" {
		return progress.Text(report)
	}
	return report
}

// read shows one step, in which an image is read and processed.
func read(ctx context.Context, steps *progress.Steps, doing string, reader image.Reader, ref, from string, work func(scanner.Image) error) error {
	var found error
	err := steps.Do(doing+" "+ref, func(*progress.Step) (string, error) {
		archive, err := reader.Read(ctx, ref, from)
		if err != nil {
			return "", err
		}
		defer archive.Close()
		err = work(scanner.Image{Name: archive.Ref, Location: archive.Location})
		if errors.Is(err, scanner.ErrFound) {
			found, err = err, nil
		}
		return "from the " + archive.From, err
	})
	return errors.Join(err, found)
}

func newImageSBOM() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "sbom IMAGE",
		Short: "List the contents of an image",
		Long:  "Sbom writes the bill of materials of an image: the packages in it, with version and license.",
		Example: `  polymesh image sbom shop/api:1.0.0-1c9cb0007a65 > api.cdx.json
  polymesh image sbom -o spdx-json api.tar > api.spdx.json`,
		Args: oneArg("an image: its name, or a file"),
	}
	from, open := imageFlags(cmd)
	format := formatFlag(cmd, scanner.SBOMFormats())
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		output, err := format()
		if err != nil {
			return err
		}
		reader, err := open()
		if err != nil {
			return err
		}
		defer reader.Close()
		s, err := scanner.Find(os.Args[0], "")
		if err != nil {
			return err
		}
		ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
		defer stop()
		return read(ctx, progress.New(cmd.ErrOrStderr()), "bill of materials of", reader, args[0], *from, func(i scanner.Image) error {
			list := &strings.Builder{}
			err := s.SBOM(ctx, i, output, list)
			_, printErr := io.WriteString(cmd.OutOrStdout(), forPeople(output, list.String()))
			return errors.Join(err, printErr)
		})
	}
	return cmd
}

func newImageDB() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "db",
		Short: "The vulnerability database that scans use",
		Long: `Scans use a database on this machine and never fetch one. It is Grype's, and published daily: on a machine with internet,
https://grype.anchore.io/databases/v6/latest.json names the newest file and its checksum.`,
	}
	cmd.AddCommand(newImageDBImport(), newImageDBStatus())
	return cmd
}

func newImageDBImport() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "import FILE",
		Short: "Import a database file",
		Example: `  polymesh image db import vulnerability-db_v6.1.5_2026-11-20T00:32:10Z_1763600000.tar.zst
  polymesh image db import db.tar.zst --checksum sha256:0d4c…`,
		Args: oneArg("the database's file"),
	}
	database := databaseFlag(cmd)
	checksum := cmd.Flags().String("checksum", "", "expected checksum of the file, sha256:…")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		s, err := scanner.Find(os.Args[0], *database)
		if err != nil {
			return err
		}
		ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
		defer stop()
		return progress.New(cmd.ErrOrStderr()).Do("import "+filepath.Base(args[0]), func(*progress.Step) (string, error) {
			if err := s.Import(ctx, args[0], *checksum); err != nil {
				return "", err
			}
			db, err := s.Status(ctx)
			return fmt.Sprintf("database of %s, %s old", db.Built.Format(time.DateOnly), scanner.Days(db.Age(time.Now()))), err
		})
	}
	return cmd
}

func newImageDBStatus() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show which database is in use, and how old it is",
		Args:  cobra.NoArgs,
	}
	database := databaseFlag(cmd)
	outputFlag(cmd, &output)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := checkOutput(output); err != nil {
			return err
		}
		s, err := scanner.Find(os.Args[0], *database)
		if err != nil {
			return err
		}
		db, err := s.Status(cmd.Context())
		if err != nil {
			return err
		}
		if done, err := printAs(cmd.OutOrStdout(), output, db); done {
			return err
		}
		t := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
		fmt.Fprintf(t, "path\t%s\nbuilt\t%s\nage\t%s\nschema\t%s\n", db.Path, db.Built.Format(time.RFC3339), scanner.Days(db.Age(time.Now())), db.Schema)
		return errors.Join(t.Flush(), scanner.CheckAge(db, scanner.MaxDatabaseAge, time.Now()))
	}
	return cmd
}

// passwordVar is the variable with the password of a private key: cosign's, like the key format.
const passwordVar = "COSIGN_PASSWORD"

// keyPassword returns the password of a private key from the environment, or asks for it on the terminal.
func keyPassword(twice bool) ([]byte, error) {
	if text, ok := os.LookupEnv(passwordVar); ok {
		return []byte(text), nil
	}
	if !term.IsTerminal(int(os.Stdin.Fd())) {
		return nil, fmt.Errorf("the key's password is missing: set %s (it may be empty)", passwordVar)
	}
	ask := func(prompt string) ([]byte, error) {
		fmt.Fprint(os.Stderr, prompt)
		defer fmt.Fprintln(os.Stderr)
		return term.ReadPassword(int(os.Stdin.Fd()))
	}
	first, err := ask("Password of the private key: ")
	if err != nil || !twice {
		return first, err
	}
	second, err := ask("Once more: ")
	if err == nil && string(first) != string(second) {
		err = errors.New("the two passwords differ")
	}
	return first, err
}

func newImageKeygen() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "keygen [PREFIX]",
		Short: "Create a key pair for signing images",
		Long: `Keygen writes PREFIX.key, the private key, encrypted with a password, and PREFIX.pub, the public one. PREFIX is "image"
by default. The password is read from the terminal, or from ` + passwordVar + `. The files have cosign's format.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			prefix := "image"
			if len(args) > 0 {
				prefix = args[0]
			}
			for _, file := range []string{prefix + ".key", prefix + ".pub"} {
				if _, err := os.Lstat(file); err == nil {
					return fmt.Errorf("%s is there already, and a deleted key cannot be recovered: remove it first, or use another PREFIX", file)
				}
			}
			private, public, err := signature.Generate(keyPassword)
			if err != nil {
				return err
			}
			if err := atomicfile.Write(prefix+".key", private, 0o600); err != nil {
				return err
			}
			if err := atomicfile.Write(prefix+".pub", public, 0o644); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s.key  the private key: keep it secret\n%s.pub  the public key: for --key of `polymesh image verify`, and for image-policy-key of a server\n", prefix, prefix)
			return nil
		},
	}
	return cmd
}

// placeFlags adds flags for the location of an image to sign or verify. The returned function opens the places to search; close
// them.
func placeFlags(cmd *cobra.Command) func() (*image.SignedPlaces, error) {
	var dataDir layout.DataDir
	from := cmd.Flags().String("from", "", "where the image is: "+strings.Join(image.SignedOrigins(), ", ")+" (default: the node if it has the image, or else the registry)")
	dataDirFlag(cmd, &dataDir)
	complete(cmd, "from", image.SignedOrigins())
	cmd.ValidArgsFunction = completeImages(&dataDir)
	return func() (*image.SignedPlaces, error) { return image.OpenSignedPlaces(dataDir, *from) }
}

func newImageSign() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "sign IMAGE...",
		Short: "Sign images",
		Long: `Sign signs images and stores the signatures next to them, as cosign does: in the registry, or in the node for an image that
was loaded into it. It signs the image that currently has the name, not later ones with the same name.`,
		Example: `  polymesh image sign --key image.key shop/api:1.0.0-1c9cb0007a65
  polymesh image sign --key env://SIGNING_KEY registry.example.com/team/api:1.0.0`,
		Args: someArgs("the name of an image"),
	}
	open := placeFlags(cmd)
	key := cmd.Flags().String("key", "", "file of the private key, or env://NAME for a variable that contains it")
	_ = cmd.MarkFlagRequired("key")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		signer, err := signature.ReadSigner(*key, keyPassword)
		if err != nil {
			return err
		}
		ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
		defer stop()
		steps := progress.New(cmd.ErrOrStderr())
		places, err := open()
		if err != nil {
			return err
		}
		defer places.Close()
		for _, ref := range args {
			err := steps.Do("sign "+ref, func(*progress.Step) (string, error) {
				signed, fresh, err := signature.Sign(ctx, signer, ref, places.All...)
				if !fresh {
					return "was signed", err
				}
				return signed.Digest.String(), err
			})
			if err != nil {
				return err
			}
		}
		return nil
	}
	return cmd
}

func newImageVerify() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "verify IMAGE...",
		Short: "Check the signatures of images",
		Long: `Verify checks that images are signed by one of the keys. It prints each with its digest: only that digest is
verified, not later images with the same name. The exit code is 1 if one is not signed.`,
		Example: "  polymesh image verify --key image.pub shop/api:1.0.0-1c9cb0007a65",
		Args:    someArgs("the name of an image"),
	}
	open := placeFlags(cmd)
	keyFiles := cmd.Flags().StringSlice("key", nil, "file of a public key, or env://NAME for a variable that contains it; may be repeated")
	_ = cmd.MarkFlagRequired("key")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		keys, err := signature.ReadKeys(*keyFiles...)
		if err != nil {
			return err
		}
		ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
		defer stop()
		places, err := open()
		if err != nil {
			return err
		}
		defer places.Close()
		for _, ref := range args {
			verified, err := keys.Verify(ctx, ref, places.All...)
			if err != nil {
				return err
			}
			fmt.Fprintln(cmd.OutOrStdout(), verified)
		}
		return nil
	}
	return cmd
}

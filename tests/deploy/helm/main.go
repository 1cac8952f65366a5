// Command render prints what Helm makes of a chart, without a cluster: Helm's own packages load the chart, check the
// values against its schema and render its templates.
//
//	render CHART RELEASE NAMESPACE < values.yaml
//
// A chart or values that Helm refuses end it with exit code 1 and Helm's words.
package main

import (
	"fmt"
	"io"
	"os"
	"path"

	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/engine"
	"helm.sh/helm/v3/pkg/releaseutil"
)

func main() {
	if err := run(os.Args[1:], os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(arguments []string, in io.Reader, out io.Writer) error {
	if len(arguments) != 3 {
		return fmt.Errorf("usage: render CHART RELEASE NAMESPACE < values.yaml")
	}
	chart, err := loader.Load(arguments[0])
	if err != nil {
		return err
	}
	if err := chart.Validate(); err != nil {
		return err
	}
	text, err := io.ReadAll(in)
	if err != nil {
		return err
	}
	values, err := chartutil.ReadValues(text)
	if err != nil {
		return err
	}
	release := chartutil.ReleaseOptions{Name: arguments[1], Namespace: arguments[2], Revision: 1, IsInstall: true}
	// Checks the values against values.schema.json.
	all, err := chartutil.ToRenderValues(chart, values, release, chartutil.DefaultCapabilities)
	if err != nil {
		return err
	}
	strict := engine.Engine{Strict: true, LintMode: false}
	files, err := strict.Render(chart, all)
	if err != nil {
		return err
	}
	for name := range files {
		if path.Base(name) == "NOTES.txt" {
			delete(files, name)
		}
	}
	// In the order in which Helm installs: a service account before what runs with it.
	_, manifests, err := releaseutil.SortManifests(files, chartutil.DefaultVersionSet, releaseutil.InstallOrder)
	if err != nil {
		return err
	}
	for _, manifest := range manifests {
		fmt.Fprintf(out, "---\n# Source: %s\n%s\n", manifest.Name, manifest.Content)
	}
	return nil
}

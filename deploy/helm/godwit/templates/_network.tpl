{{- /* SPDX-License-Identifier: Apache-2.0 */ -}}
{{- define "godwit.network.dns" -}}
- ports: [{port: 53, protocol: UDP}, {port: 53, protocol: TCP}]
  to:
    - namespaceSelector:
        matchLabels:
          kubernetes.io/metadata.name: kube-system
{{- end -}}

{{- define "godwit.network.apiServer" -}}
- ports:
    {{- range .Values.networkPolicy.apiServerPorts }}
    - {port: {{ . }}, protocol: TCP}
    {{- end }}
  {{- with .Values.networkPolicy.apiServer }}
  to: {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}

{{- /* A pod that asks the orchestrator as a viewer: (dict "root" $ "component" "tests" "args" (list ...)). */ -}}
{{- define "godwit.asking.spec" -}}
{{- $root := .root -}}
{{- $tls := include "godwit.tls" $root -}}
automountServiceAccountToken: false
{{- with include "godwit.pullSecrets" $root }}{{ . | nindent 0 }}{{ end }}
restartPolicy: Never
enableServiceLinks: false
nodeSelector: {{- toYaml $root.Values.orchestrator.nodeSelector | nindent 2 }}
{{- with $root.Values.orchestrator.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
securityContext: {{- include "godwit.unprivilegedPod" $root | nindent 2 }}
containers:
  - name: {{ .component }}
    image: {{ include "godwit.image" (list $root $root.Values.orchestrator.image) }}
    imagePullPolicy: {{ $root.Values.image.pullPolicy }}
    command: [godwit]
    args:
      - --orchestrator={{ include "godwit.url" $root }}
      {{- if $tls }}
      - --tls-dir=/etc/godwit/tls
      {{- end }}
      {{- range .args }}
      - {{ . }}
      {{- end }}
    resources:
      requests: {cpu: 10m, memory: 96Mi}
      limits: {memory: 256Mi}
    securityContext: {{- include "godwit.confined" $root | nindent 6 }}
    {{- if $tls }}
    volumeMounts:
      - {name: tls, mountPath: /etc/godwit/tls, readOnly: true}
    {{- end }}
{{- if $tls }}
volumes:
  - name: tls
    secret:
      secretName: {{ include "godwit.secret.viewer" $root }}
      defaultMode: 0440
{{- end }}
{{- end -}}
